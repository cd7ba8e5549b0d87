/** Messages: announcements for screen readers, and visible errors. */

import { Problem, hasKey, useKey } from "./api.js";
import { sentenceOf } from "./problems.js";
import { $, button } from "./state.js";

const PASSING = [0, 429, 502, 503, 504]; // statuses after which the same request may succeed

/** Announces a text in the live region, without showing it. */
export function announce(text) {
  $("status").textContent = text;
}

/**
 * Shows a sentence in `box`, below those that are there, until it is dismissed.
 *
 * `again` is offered as "Try again".
 */
export function complain(text, again, box = $("alert")) {
  for (const other of [...box.children]) if (other.firstChild.textContent === text) other.remove();
  const notice = document.createElement("div");
  notice.className = "notice";
  const words = document.createElement("p");
  words.textContent = text;
  const choices = document.createElement("p");
  choices.className = "choices";
  const retry = () => {
    settle();
    again();
  };
  if (again) choices.append(button("Try again", retry));
  choices.append(button("Dismiss", () => notice.remove()));
  notice.append(words, choices);
  box.append(notice);
}

/** Removes every message about the question; those about files stay until they are dismissed. */
export function settle() {
  for (const box of document.querySelectorAll('[role="alert"]:not(.files)')) box.replaceChildren();
}

/** Says of files why they are not used, where files are added. */
export function complainOfFiles(sentences) {
  for (const sentence of sentences) complain(sentence, null, $("files-failure"));
  $("files-failure").scrollIntoView({ block: "nearest" });
}

/** Shows the images and their answer, or the start; what is said of files goes along. */
export function showWork(isShown) {
  $("welcome").hidden = isShown;
  $("work").hidden = !isShown;
  const home = isShown ? $("strip") : document.querySelector(".welcome-words");
  if ($("files-failure").parentElement !== home) home.append($("files-failure"));
}

/** Shows an error in `box`; if the key is missing, prompts for it and continues with `again`. */
export function failed(error, again, box = $("alert")) {
  if (!(error instanceof Problem)) throw error; // a bug of this page goes to the console
  if (error.status === 401) askForKey(again);
  else complain(sentenceOf(error), PASSING.includes(error.status) ? again : null, box);
}

/** Offers to take a removal back, until the next one. */
export function offerUndo(text, undo) {
  const box = $("undo");
  const close = () => {
    box.hidden = true;
  };
  const words = document.createElement("p");
  words.textContent = text;
  const take = () => {
    close();
    undo();
  };
  box.replaceChildren(words, button("Undo", take), button("Dismiss", close));
  box.hidden = false;
  announce(`${text} Undo brings it back.`);
}

function askForKey(again) {
  $("key-detail").textContent = hasKey() ? "The service does not accept the key that was given." : "";
  $("key").hidden = false;
  $("key-field").focus();
  $("key").onsubmit = (event) => {
    event.preventDefault();
    useKey($("key-field").value.trim());
    $("key-field").value = "";
    $("key").hidden = true;
    again?.();
  };
}
