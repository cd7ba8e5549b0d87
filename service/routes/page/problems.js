/** Errors in the words of a visitor: the service's sentences without what only a program can do. */

import { METHODS } from "./tables.js";

// A clause with one of these is for programs: it names commands, options, headers, routes or settings.
const FOR_PROGRAMS =
  /\bcurl\b|(^|\s)-{1,2}[A-Za-z]|\w=\S|CAMSERVE|Retry-After|[Cc]ontent.?[Tt]ype|-Encoding|Authorization|X-API-Key|multipart|JSON|base64|\bquery\b|\b(GET|POST)\b|request id|(^|\s)\/\w/;

const IN_PLACE = {
  queue_full: ["The service is busy.", "Try again in a moment."],
  shutting_down: ["The service is restarting.", "Try again in a moment."],
  deadline_exceeded: ["", "Try again, or choose a faster method."],
  out_of_memory: ["The service has too little free memory.", "Try again, or choose a later layer."],
  empty_body: ["The file is empty.", "Choose another one."],
  empty_image: ["The file is empty.", "Choose another one."],
  body_too_large: ["", "Choose a smaller image."],
  slow_upload: ["The connection is too slow: the image did not arrive in time.", "Try again, or choose a smaller image."],
};

const BY_STATUS = {
  400: "The service cannot read this file as an image.",
  404: "The service does not have this.",
  413: "The image is too large. Choose a smaller one.",
  415: "The service cannot read this file as an image.",
  422: "The service cannot do this with this image and model.",
  429: "The service is busy. Try again in a moment.",
  500: "The service failed on this image.",
};
const NO_ANSWER = "The service cannot be used at the moment. Try again later."; // a proxy's 502, 503 or 504

/** What an error says to a visitor. */
export function sentenceOf({ status, code, message, retryAfter, request }) {
  const clauses = forPeople(message.split(/(?<=[.;?!])\s+/));
  const [first, advice] = IN_PLACE[code] ?? [];
  const own = advice === undefined ? clauses.join(" ") : `${first || ended(clauses[0] ?? "")} ${advice}`.trim();
  const text = ended(own || (BY_STATUS[status] ?? NO_ANSWER)).replace("in a moment", retryAfter > 1 ? `in ${retryAfter} s` : "in a moment");
  const log = status === 500 && request ? ` The service's log has the cause under ${request}.` : "";
  return (code === "invalid_option" ? titled(text) : text) + log;
}

/** The clauses that a visitor can use; the one before a left-out clause ends its sentence. */
function forPeople(clauses) {
  const isUsable = (clause) => clause && !FOR_PROGRAMS.test(clause);
  return clauses.map((clause, place) => (isUsable(clauses[place + 1] ?? "end") ? clause : ended(clause))).filter(isUsable);
}

/** A sentence with a full stop at its end. */
const ended = (text) => (/^$|[.?!]$/.test(text) ? text : `${text.replace(/[;,:\s]+$/, "")}.`);

/** Methods by their titles, and no names in code's quotes. */
function titled(text) {
  const titles = new Map(METHODS.map(({ name, title }) => [name, title]));
  return text.replace(/`/g, "").replace(/[a-z]\w+/g, (word) => titles.get(word) ?? word);
}
