/** The same request as a command and as a program. */

/** A word of a POSIX shell. */
export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

/** curl takes commas, semicolons and quotes in a file's name only in its own quotes. */
function part(name) {
  const plain = /^[^",;\\]+$/.test(name);
  return plain ? `image=@${name}` : `image=@"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
}

const KEY = `-H "Authorization: Bearer $CAMSERVE_KEY"`;

/**
 * @param {string} base  address of the service, ending in a slash
 * @param {string} name  of the image file
 * @param {string} query  the options
 * @param {{key: boolean, accept?: string, out?: string}} more
 */
export function curl(base, name, query, { key, accept, out }) {
  const words = [`curl -F ${quoted(part(name))} ${quoted(`${base}explain${query && `?${query}`}`)}`];
  if (key) words.push(KEY);
  if (accept) words.push(`-H ${quoted(`accept: ${accept}`)}`);
  if (out) words.push(`-o ${quoted(out)}`);
  return words.join(" \\\n  ");
}

/** A program with the Python client; parameters as in `curl`, options as pairs. */
export function python(base, name, pairs, { key }) {
  const names = [...new Set(pairs.map(([option]) => option))];
  const values = (option) => pairs.filter(([other]) => other === option).map(([, value]) => literal(value));
  const argument = (values) => (values.length > 1 ? `[${values.join(", ")}]` : values[0]);
  return [
    ...(key ? ["import os", ""] : []),
    "from api_schemas.client import Client",
    "",
    `with Client(${literal(base)}${key ? ', api_key=os.environ["CAMSERVE_KEY"]' : ""}) as client:`,
    "    answer = client.explain(",
    `        ${literal(name)},`,
    ...names.map((option) => `        ${option}=${argument(values(option))},`),
    "    )",
    "for prediction in answer[0].predictions:",
    '    print(f"{prediction.score:7.1%}  {prediction.label}")',
    "explanation = answer[0].explanations[0]",
    'explanation.heatmap.save("heatmap.png")',
    "print(explanation.regions.boxes)",
    "",
  ].join("\n");
}

/** JSON's strings and numbers are Python's, too. */
const literal = (value) => JSON.stringify(value);
