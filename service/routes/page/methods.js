/** The methods of the server: what they show, whether they have a layer, and their cost. */

import { BACKWARD, METHODS, STRIDE, WINDOW } from "./tables.js";

/** The record of a method, as in api_schemas/methods.py. */
export const method = (name) => METHODS.find((record) => record.name === name);

/** The method of the server where a request names none, by the task of the model. */
export const presetMethod = ({ task }) => (isOfTask(task) ? "hirescam" : "gradcam");

const isOfTask = (task) => task === "detection" || task === "segmentation";

/** Whether a method explains a layer. */
export const hasLayer = (name) => method(name).needs.includes("layer");

/** `<optgroup>`s of a select, in the order of the table. */
export function methodOptions() {
  return [...new Set(METHODS.map((record) => record.group))].map((label) => {
    const group = Object.assign(document.createElement("optgroup"), { label });
    const inside = METHODS.filter((record) => record.group === label);
    group.append(...inside.map(({ title, name }) => new Option(title, name)));
    return group;
  });
}

/**
 * Forward passes that a question will cost at most, as the server will count them.
 *
 * @param {{method: string, samples: number | null, steps: number}} question
 * @param {{width: number, height: number}} input  of the model, in pixels
 * @param {number[] | null} shape  of the layer, channels first
 */
export function forwards(question, input, shape) {
  const { runs, times, samples } = method(question.method);
  const squares = (length) => Math.ceil(Math.max(length - WINDOW, 0) / STRIDE) + 1;
  const count = {
    once: 1,
    channels: shape?.[0] ?? 0,
    squares: squares(input.width) * squares(input.height),
    samples: question.samples ?? samples,
    steps: question.steps,
  };
  const passes = { forward: 1, gradient: 1 + BACKWARD, tail: 1 };
  return 1 + (runs === "tail") + (passes[runs] ?? 0) * count[times];
}
