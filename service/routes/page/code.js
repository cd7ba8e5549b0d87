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

/** A program with httpx alone; parameters as in `curl`, options as pairs. */
export function python(base, name, pairs, { key }) {
  const options = pairs.map(([option, value]) => `    (${literal(option)}, ${literal(String(value))}),`);
  return [
    ...(key ? ["import os", ""] : []),
    "import httpx",
    "",
    "options = [",
    ...options,
    "]",
    `with open(${literal(name)}, "rb") as image:`,
    "    answer = httpx.post(",
    `        ${literal(`${base}explain`)},`,
    "        params=options,",
    `        files={"image": image},`,
    ...(key ? [`        headers={"Authorization": f"Bearer {os.environ['CAMSERVE_KEY']}"},`] : []),
    "        timeout=60,",
    "    )",
    "answer.raise_for_status()",
    "result = answer.json()[\"results\"][0]",
    "for prediction in result[\"predictions\"]:",
    `    print(f"{prediction['score']:7.1%}  {prediction['label']}")`,
    `print(result["explanations"][0]["regions"]["boxes"])`,
    "",
  ].join("\n");
}

/** JSON's strings are Python's, too. */
const literal = (text) => JSON.stringify(text);
