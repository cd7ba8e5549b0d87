/** The verdict on a map: a sentence, what to do about it, and its numbers behind a click. */

import { button } from "./state.js";

const WORDS = { supported: "Supported", inconclusive: "Inconclusive", refuted: "Refuted" };

// Why a map is neither supported nor refuted: what comes before the class, and after it.
const REASONS = {
  flat_map: ["the map of ", " is the same everywhere, so there is nothing to test."],
  flat_score: ["hiding parts of the image hardly changes ", "."],
  elsewhere_as_good: ["the same shape at other places explains ", " as well."],
  centre_as_good: ["a spot in the center of the image explains ", " as well."],
  fills_disagree: ["parts hidden by the mean color and parts hidden by a blur give opposite results for ", "."],
};

const subjectOf = ({ explanation, contrastLabel }) =>
  contrastLabel ? `${explanation.label} rather than ${contrastLabel}` : explanation.label;

/** The sentence in parts: the word, what comes before the class, the class, what comes after it. */
function sentenceOf(shown) {
  const { verdict, reason, try_layer: layer } = shown.explanation.verify;
  const word = WORDS[verdict];
  const subject = subjectOf(shown);
  if (verdict === "supported") {
    return [word, "hiding what this map marks lowers ", subject, " more than hiding the same shape elsewhere."];
  }
  if (verdict === "refuted") {
    return [word, "", subject, " depends on a place, but half of all other places explain it at least as well as what this map marks."];
  }
  const [before, after] = REASONS[reason];
  return [word, before, subject, layer ? `${after} The map of an earlier layer is finer.` : after];
}

/** The sentence as text. */
export function verdictWords(shown) {
  const [word, before, subject, after] = sentenceOf(shown);
  return `${word}: ${before}${subject}${after}`;
}

/** The elements of a verdict; none where the map was not tested. `put` changes the question. */
export function verdictOf(shown, put) {
  const { verify, method } = shown.explanation;
  if (!verify) return [];
  const [word, before, subject, after] = sentenceOf(shown);
  const words = Object.assign(document.createElement("p"), { className: `verdict-words ${verify.verdict}` });
  words.append(part("strong", `${word}:`), ` ${before}`, part("em", subject), after);
  if (!verify.try_layer) return [words, numbersOf(verify)];
  const again = button(`Try ${verify.try_layer}`, () => put({ method, layer: verify.try_layer }));
  return [words, again, numbersOf(verify)];
}

function part(name, text) {
  return Object.assign(document.createElement(name), { textContent: text });
}

const number = (value) => value.toFixed(2).replace("-", "−");

const share = (value) => `${(100 * value).toFixed(1)} %`;

function numbersOf(verify) {
  const { agreement_by_fill: fills, elsewhere, baselines } = verify;
  const rows = [
    ["Agreement of map and score, −1 to 1", number(verify.agreement)],
    ["… parts hidden by the mean color", number(fills.mean)],
    ["… parts hidden by a blur", number(fills.blur)],
    ["Same shape elsewhere, median", number(elsewhere.median)],
    ["Same shape elsewhere, best", number(elsewhere.best)],
    ["Places that agree at least as well (p)", share(verify.p_place)],
    ["… places near the center count more (p)", share(verify.p_centred)],
    ["Spot in the center", number(baselines.centre)],
    ["Edges, colors and texture", number(baselines.contrast)],
  ];
  if (verify.p_class !== undefined) rows.push(["Classes that agree at least as well (p)", share(verify.p_class)]);
  for (const { layer, verdict, agreement } of verify.tried ?? []) rows.push([`Tried ${layer}`, `${verdict}, ${number(agreement)}`]);
  rows.push(["Forward passes", verify.forwards], ["Design", verify.design]);
  const list = document.createElement("dl");
  list.append(...rows.flatMap(([name, value]) => [part("dt", name), part("dd", value)]));
  const limits = part("p", "A supported map shows what the score depends on: not why, and not that the model is right. ");
  limits.className = "hint";
  limits.append("More: ", part("code", "docs/explanation/verdicts.md"), ".");
  const details = document.createElement("details");
  details.append(part("summary", "Numbers"), list, limits);
  return details;
}
