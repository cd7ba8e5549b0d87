/** The methods in words: what each shows, whether it has a layer, and what it costs. */

const FORWARD_AND_BACKWARD = 2.5; // as in service/questions.py
const WINDOW = 32;
const STRIDE = 16;

export const METHODS = [
  { name: "gradcam", title: "Grad-CAM", layer: true, words: "Where the layer's channels that speak for the class are active." },
  { name: "gradcampp", title: "Grad-CAM++", layer: true, words: "Like Grad-CAM; made for several objects of a class." },
  { name: "hirescam", title: "HiResCAM", layer: true, words: "Gradient times activation, cell by cell." },
  { name: "layercam", title: "LayerCAM", layer: true, words: "What speaks for the class, cell by cell; also for early layers." },
  { name: "xgradcam", title: "XGrad-CAM", layer: true, words: "Like Grad-CAM, gradients weighted by the activation." },
  { name: "eigencam", title: "Eigen-CAM", layer: true, words: "What stands out in the layer. It knows no class." },
  { name: "cam", title: "CAM", layer: true, words: "The original: channels weighted by the linear head." },
  { name: "ablationcam", title: "Ablation-CAM", layer: true, words: "How much the class falls without each channel." },
  { name: "scorecam", title: "Score-CAM", layer: true, words: "How the class scores when seen through each channel. Slow." },
  { name: "input_gradient", title: "Input gradient", layer: false, words: "How much each pixel would move the class. Noisy." },
  { name: "integrated_gradients", title: "Integrated gradients", layer: false, words: "Gradients summed on the way from plain grey to the photograph." },
  { name: "guided_backprop", title: "Guided backprop", layer: false, words: "Sharp edges that hardly depend on the class: a picture, not evidence." },
  { name: "guided_gradcam", title: "Guided Grad-CAM", layer: true, words: "Guided backprop where Grad-CAM looks." },
  { name: "occlusion", title: "Occlusion", layer: false, words: "How the class falls when a square hides each part. Slow." },
  { name: "rise", title: "RISE", layer: false, words: "How the class scores under random masks. Slow; needs no gradients." },
  { name: "attention_rollout", title: "Attention rollout", layer: false, words: "What the class token attends to; transformers only. It knows no class." },
];

const GROUPS = [
  ["At a layer", ["gradcam", "gradcampp", "hirescam", "layercam", "xgradcam", "eigencam", "cam", "ablationcam", "scorecam"]],
  ["At the pixels", ["input_gradient", "integrated_gradients", "guided_backprop", "guided_gradcam"]],
  ["By hiding parts", ["occlusion", "rise"]],
  ["Of transformers", ["attention_rollout"]],
];

export const method = (name) => METHODS.find((each) => each.name === name);

/** `<optgroup>`s of a select, in the order of GROUPS. */
export function methodOptions() {
  return GROUPS.map(([label, names]) => {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...names.map((name) => new Option(method(name).title, name)));
    return group;
  });
}

/**
 * Forward passes that a question will cost at most, as the server will count them.
 *
 * @param {{method: string, samples: number, steps: number}} question
 * @param {{width: number, height: number}} input  of the model, in pixels
 * @param {number[] | null} shape  of the layer, channels first
 */
export function forwards(question, input, shape) {
  const squares = (length) => Math.ceil(Math.max(length - WINDOW, 0) / STRIDE) + 1;
  const extra = {
    scorecam: shape?.[0] ?? 0,
    ablationcam: (shape?.[0] ?? 0) + 1,
    input_gradient: FORWARD_AND_BACKWARD,
    guided_backprop: FORWARD_AND_BACKWARD,
    guided_gradcam: FORWARD_AND_BACKWARD,
    integrated_gradients: FORWARD_AND_BACKWARD * question.steps,
    occlusion: squares(input.width) * squares(input.height),
    rise: question.samples,
    attention_rollout: 1,
  };
  return 1 + (extra[question.method] ?? 0);
}
