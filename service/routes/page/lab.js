/** The lab: a region of the shown image, an edit of it, and the list of experiments. */

import { query, request } from "./api.js";
import { syncExport } from "./export.js";
import { EDITS, beforeAndAfter, cardOf, controlWords } from "./experiments.js";
import { maskOf, regionBoxes, runLengths } from "./heat.js";
import { method } from "./methods.js";
import { announce, complain, failed } from "./notices.js";
import { nameOf, targetOption } from "./question.js";
import { rectangle } from "./stage.js";
import { $, button, state } from "./state.js";

const SIDE = 800; // longer side of the drawn image, in pixels
const EDGES = ["box-x", "box-y", "box-w", "box-h"];

const kindOf = () => document.querySelector("[name=region]:checked").value;

/** The threshold of the view; a region of everything is useless, so 0 means the server's default. */
const threshold = () => state.view.threshold || 0.5;

export class Lab {
  constructor() {
    $("edit").replaceChildren(...Object.entries(EDITS).map(([name, { title }]) => new Option(title, name)));
    $("edit").addEventListener("change", () => this.sync());
    $("experiment").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    for (const name of EDGES) $(name).addEventListener("input", () => this.chooseBox());
    for (const radio of document.querySelectorAll("[name=region]")) radio.addEventListener("change", () => this.draw());
    this.wirePointer($("lab-marks").parentElement);
  }

  /** Empties the lab until the next map; a pending experiment is cancelled. */
  clear() {
    this.pending?.abort();
    this.pending = null;
    this.shown = null;
    $("run-experiment").removeAttribute("aria-busy");
    $("lab").hidden = true;
    $("lab").dataset.request = "";
    $("lab-words").textContent = "";
    $("lab-failure").replaceChildren();
    $("experiments").replaceChildren();
  }

  /** Works with another map, of the same image or another. */
  use(shown) {
    const isNew = this.shown?.image !== shown.image;
    this.shown = shown;
    $("lab").hidden = false;
    $("lab").dataset.request = shown.answer.id;
    if (isNew) this.useImage(shown);
    this.sync();
    this.list();
  }

  useImage({ image: { bitmap, name }, source }) {
    const canvas = $("lab-image");
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.setAttribute("aria-label", `${name}, to draw a box on`);
    document.querySelector("[name=region][value=map]").checked = true;
    const { width, height } = source;
    this.setBox([width / 4, height / 4, width / 2, height / 2]);
  }

  /** The choices that depend on the images of the session. */
  sync() {
    const others = state.images.filter((image) => image !== state.image && image.bitmap);
    for (const option of $("edit").options) option.disabled = EDITS[option.value].needs && others.length === 0;
    if ($("edit").selectedOptions[0].disabled) $("edit").value = "hide";
    const chosen = $("donor").value;
    $("donor").replaceChildren(...others.map((image) => new Option(image.name, image.id)));
    if (others.some((image) => String(image.id) === chosen)) $("donor").value = chosen;
    $("donor-field").hidden = !EDITS[$("edit").value].needs;
    if (others.length === 0) this.say("Add a second image to fill from it.");
    else if (!this.pending) this.say("");
    this.draw();
  }

  say(words) {
    $("lab-words").textContent = words;
  }

  // ---- the region -----------------------------------------------------------------------------

  box() {
    return EDGES.map((name) => $(name).valueAsNumber || 0);
  }

  setBox(box) {
    EDGES.forEach((name, index) => {
      $(name).value = Math.round(box[index]);
    });
  }

  chooseBox() {
    document.querySelector("[name=region][value=box]").checked = true;
    this.draw();
  }

  /** Draws again if the threshold of the view has changed. */
  follow() {
    if (this.threshold !== threshold()) this.draw();
  }

  /** The image, darker outside the region; a box is outlined, too. */
  draw() {
    this.threshold = threshold();
    $("lab-threshold").textContent = `${Math.round(100 * this.threshold)} %`;
    if (!this.shown) return;
    const { image, source } = this.shown;
    const { width, height } = $("lab-image");
    const shade = new OffscreenCanvas(width, height);
    const context = shade.getContext("2d");
    this.painter()(context, width, height);
    context.globalCompositeOperation = "source-out";
    context.fillStyle = "#000a";
    context.fillRect(0, 0, width, height);
    const canvas = $("lab-image").getContext("2d");
    canvas.drawImage(image.bitmap, 0, 0, width, height);
    canvas.drawImage(shade, 0, 0);
    $("lab-marks").setAttribute("viewBox", `0 0 ${source.width} ${source.height}`);
    const boxes = kindOf() === "box" ? [rectangle("box under", this.box()), rectangle("box", this.box())] : [];
    $("lab-marks").replaceChildren(...boxes);
  }

  wirePointer(stage) {
    let start = null;
    const at = (event) => {
      const frame = stage.getBoundingClientRect();
      const { width, height } = this.shown.source;
      const along = (value, length, whole) => Math.round(Math.min(1, Math.max(0, value / length)) * whole);
      return [along(event.clientX - frame.left, frame.width, width), along(event.clientY - frame.top, frame.height, height)];
    };
    stage.addEventListener("pointerdown", (event) => {
      if (!this.shown || event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      start = at(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (!start || !this.shown) return;
      const [x, y] = at(event);
      const size = [Math.abs(x - start[0]), Math.abs(y - start[1])];
      if (Math.min(...size) < 1) return;
      this.setBox([Math.min(x, start[0]), Math.min(y, start[1]), ...size]);
      this.chooseBox();
    });
    const end = () => {
      start = null;
    };
    stage.addEventListener("pointerup", end);
    stage.addEventListener("pointercancel", end);
  }

  /** A function that paints the region, opaque, on a context of a width and height. */
  painter() {
    const { map, source } = this.shown;
    if (kindOf() === "map") {
      const mask = maskOf(map, threshold());
      return (context, width, height) => context.drawImage(mask, 0, 0, width, height);
    }
    const [x, y, w, h] = this.box();
    return (context, width, height) => {
      const [across, down] = [width / source.width, height / source.height];
      context.fillRect(x * across, y * down, w * across, h * down);
    };
  }

  /** The region in words and on the wire; null where the map marks nothing. */
  region() {
    const { map, source, explanation, model } = this.shown;
    if (kindOf() === "box") {
      const [x, y, w, h] = this.box();
      return { words: `box at ${x}, ${y}, ${w} × ${h}`, wire: { boxes: [[x, y, w, h]] } };
    }
    if (regionBoxes(map, source, threshold()).length === 0) return null;
    const title = method(explanation.method).title;
    const words = `what ${title} marks for ${nameOf(model, explanation.class_id)}, from ${Math.round(100 * threshold())} %`;
    return { words, wire: { rle: runLengths(map, source, threshold()) } };
  }

  // ---- an experiment --------------------------------------------------------------------------

  async run() {
    if (!this.shown || this.pending) return;
    const { shown } = this;
    const { image, model } = shown;
    const edit = $("edit").value;
    const region = this.region();
    const paint = this.painter();
    $("lab-failure").replaceChildren();
    if (!region) return complain("The map marks nothing from this threshold on. Lower the threshold, or draw a box.", null, $("lab-failure"));
    const donor = EDITS[edit].needs ? state.images.find(({ id }) => String(id) === $("donor").value) : null;
    const title = `${EDITS[edit].title[0].toUpperCase()}${EDITS[edit].title.slice(1)}${donor ? ` (${donor.name})` : ""}: ${region.words}`;
    const sent = [{ name: "edit", ...EDITS[edit].wire(), region: region.wire }];
    const pending = new AbortController();
    this.pending = pending;
    $("run-experiment").setAttribute("aria-busy", "true");
    this.say("Running the edit and its controls …");
    announce("Running the edit and its controls.");
    try {
      const answer = await request(path(shown), { body: form(image, donor, sent), signal: pending.signal });
      if (pending.signal.aborted) return;
      const canvases = beforeAndAfter(image.bitmap, paint, edit, donor?.bitmap ?? null);
      this.add({ title, image, model, sent, answer, canvases });
    } catch (error) {
      if (error.name !== "AbortError") failed(error, () => this.run(), $("lab-failure"));
    } finally {
      if (this.pending === pending) {
        this.pending = null;
        $("run-experiment").removeAttribute("aria-busy");
        this.say("");
      }
    }
  }

  add(experiment) {
    const [result] = experiment.answer.results;
    const [edit] = result.edits ?? [];
    const problem = result.error ?? edit.error;
    if (problem) return complain(problem.detail, null, $("lab-failure"));
    Object.assign(experiment, { result, edit, request: experiment.answer.id });
    experiment.card = cardOf(experiment);
    experiment.card.append(
      button("Remove", () => {
        state.experiments = state.experiments.filter((other) => other !== experiment);
        this.list();
        $("run-experiment").focus();
      }),
    );
    state.experiments.unshift(experiment);
    this.list();
    const [change] = edit.changes;
    const control = change.control ?? edit.control;
    announce(`${change.label}: ${(100 * change.score_change).toFixed(1)} points. ${control?.n ? controlWords(control) : ""}`);
  }

  /** Lists the experiments with the shown image. */
  list() {
    const cards = state.experiments.filter(({ image }) => image === this.shown.image).map(({ card }) => card);
    $("experiments").replaceChildren(...cards);
    syncExport();
  }
}

function path({ model, question, explanation }) {
  const { box, class_id: id } = explanation;
  const pairs = [["model", model.name], box ? ["at", box.join(",")] : ["targets", targetOption(model, id)]];
  if (question.fit) pairs.push(["fit", question.fit]);
  return `experiments?${query(pairs)}`;
}

function form(image, donor, edits) {
  const body = new FormData();
  body.append("image", image.file, image.name);
  if (donor) body.append("image", donor.file, donor.name);
  body.append("edits", JSON.stringify(edits));
  return body;
}
