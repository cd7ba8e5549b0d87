/** The section "Inside a layer": a layer's channels, in several orders, one of them enlarged; its kernels. */

import { download, query, request } from "./api.js";
import { Sheet } from "./channels.js";
import { bitmapOf } from "./images.js";
import { reasonAgainst } from "./knows.js";
import { announce, failed } from "./notices.js";
import { contrastsOf, nameOf, targetOption } from "./question.js";
import { shapeWords } from "./stage.js";
import { $, button, state } from "./state.js";

const NAMED = 8; // channels at the top of an order that are named

export class Inside {
  constructor() {
    this.channel = 0;
    this.values = {}; // of each channel of the shown layer, by order
    this.sheet = new Sheet($("sheet"), (channel) => this.open(channel));
    $("inside-show").addEventListener("click", () => this.ask());
    $("kernels-show").addEventListener("click", () => this.askForKernels());
    $("inside-layer").addEventListener("change", () => this.syncLayer());
    $("order").addEventListener("change", () => this.rank($("order").value));
    $("channel").addEventListener("input", () => {
      if ($("channel").validity.valid) this.sheet.point($("channel").valueAsNumber);
    });
    $("open-channel").addEventListener("submit", (event) => {
      event.preventDefault();
      this.open($("channel").valueAsNumber);
    });
    const step = (steps) => this.open(this.sheet.beside(this.channel, steps));
    $("channel-back").addEventListener("click", () => step(-1));
    $("channel-next").addEventListener("click", () => step(1));
    $("channel-view").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
  }

  /** The layers of another model. */
  use(model) {
    const drawable = model.layers.filter((layer) => layer.path && layer.shape);
    $("inside-layer").replaceChildren(
      ...drawable.map((layer) => new Option(`${layer.path} · ${layer.type} · ${shapeWords(layer.shape)}`, layer.path)),
    );
    $("inside-layer").value = model.target_layer;
    $("inside-layer").disabled = false;
    const [byWeight] = $("order").querySelectorAll("[value=weight]");
    byWeight.title = reasonAgainst(model, "gradcam");
    byWeight.disabled = Boolean(byWeight.title);
    this.syncLayer();
    this.clear();
  }

  /** The layer whose kernels are shown: the chosen one, or the first inside it that has some. */
  withKernels() {
    const chosen = $("inside-layer").value;
    const isInside = ({ path }) => path === chosen || path.startsWith(`${chosen}.`);
    return state.model.layers.find((layer) => layer.kernels && isInside(layer))?.path;
  }

  syncLayer() {
    const layer = this.withKernels();
    $("kernels-show").disabled = !layer;
    $("kernels-show").textContent = !layer || layer === $("inside-layer").value ? "Show its kernels" : `Show kernels of ${layer}`;
    $("kernels-show").title = layer ? "" : "This layer has no kernels. Choose a convolution or a linear layer.";
  }

  /** Shows nothing until the next request. */
  clear() {
    this.pending?.abort();
    $("inside-failure").replaceChildren();
    $("channels").hidden = true;
    $("kernels").hidden = true;
    $("channels").dataset.request = "";
    $("channel-view").close();
  }

  /** Does `work` with a signal, with `control` busy; another work or another image aborts it. */
  async busy(control, work) {
    const { image, model } = state;
    if (!image || !model) return;
    this.pending?.abort();
    const pending = new AbortController();
    this.pending = pending;
    $("inside-failure").replaceChildren();
    control.setAttribute("aria-busy", "true");
    try {
      await work(image, model, pending.signal);
    } catch (error) {
      if (error.name !== "AbortError") failed(error, () => this.busy(control, work), $("inside-failure"));
    } finally {
      control.removeAttribute("aria-busy");
    }
  }

  ask() {
    const layer = $("inside-layer").value;
    return this.busy($("inside-show"), async (image, model, signal) => {
      const forms = ["image", "stats", "channels"].map((form) => ["activation_as", form]);
      const path = `predict?${query([["model", model.name], ...fitOf(state.question), ["activations", layer], ...forms])}`;
      const answer = await request(path, { body: image.file, signal });
      await this.show(answer.results[0].activations[0], signal);
      if (!signal.aborted) $("channels").dataset.request = answer.id;
    });
  }

  askForKernels() {
    const layer = this.withKernels();
    return this.busy($("kernels-show"), async (_image, model, signal) => {
      const path = layer.split("/").map(encodeURIComponent).join("/");
      const file = await download(`models/${encodeURIComponent(model.name)}/kernels/${path}`, signal);
      const bitmap = await bitmapOf(file);
      if (signal.aborted) return;
      Object.assign($("kernels-canvas"), { width: bitmap.width, height: bitmap.height });
      $("kernels-canvas").getContext("2d").drawImage(bitmap, 0, 0);
      const words = `Kernels of ${layer}: the weights, the same for every image.`;
      $("kernels-words").textContent = words;
      $("kernels-canvas").setAttribute("aria-label", words);
      $("kernels").hidden = false;
      announce(words);
    });
  }

  /** The channels in another order: by number, by their mean activation, or by their weight for the class. */
  rank(order) {
    if (order !== "weight" || this.values.weight) return this.arrange(order);
    const { layer } = this;
    return this.busy($("order"), async (image, model, signal) => {
      const { explanation = null, contrastLabel } = state.shown ?? {};
      const contrasts = explanation ? contrastsOf(explanation).map((id) => ["contrast", id]) : [];
      const pairs = explanation ? [["targets", explanation.class_id], ...contrasts] : [];
      const target = pairs.map(([name, value]) => [name, targetOption(model, value)]);
      const gradient = [["activations", layer], ["activation_kind", "grad_output"], ["activation_as", "channels"]];
      const path = `explain?${query([["model", model.name], ...fitOf(state.question), ...target, ...gradient, ["include", "none"]])}`;
      const [{ explanations, activations }] = (await request(path, { body: image.file, signal })).results;
      if (signal.aborted || layer !== this.layer) return;
      const than = contrastLabel ? ` rather than ${contrastLabel}` : "";
      this.target = `${nameOf(model, explanations[0].class_id)}${than}`;
      this.values.weight = activations[0].channels.mean;
      this.arrange(order);
    });
  }

  arrange(order) {
    const { count } = this.sheet.layout;
    const channels = Array.from({ length: count }, (_, channel) => channel);
    const values = this.values[order];
    if (values) channels.sort((one, other) => values[other] - values[one]);
    this.sheet.arrange(channels);
    this.name(order, values ? channels.slice(0, NAMED) : []);
  }

  /** Names the first channels of an order. */
  name(order, first) {
    const what = order === "weight" ? `Highest weight for ${this.target} (mean gradient of its logit)` : "Highest mean activation";
    $("top-channels").hidden = first.length === 0;
    $("top-words").textContent = `${what}:`;
    $("top-list").replaceChildren(
      ...first.map((channel) => {
        const item = document.createElement("li");
        item.append(button(`${channel}: ${signedNumber(this.values[order][channel])}`, () => this.open(channel)));
        return item;
      }),
    );
    if (first.length) announce(`${what}: channels ${first.join(", ")}.`);
  }

  async show(activation, signal) {
    await this.sheet.show(activation);
    if (signal.aborted) return;
    this.layer = activation.layer;
    this.values = { activation: activation.channels.mean };
    $("order").value = "number";
    $("order-field").hidden = this.sheet.layout === null;
    this.name("number", []);
    const { layout } = this.sheet;
    const { min, max, mean, zero_fraction: zeros } = activation.stats;
    const left = activation.image.channels_left_out;
    const values = `${number(min)} to ${number(max)}, mean ${number(mean)}, ${Math.round(100 * zeros)} % zeros`;
    const words = `${activation.layer}: ${shapeWords(activation.shape)}; ${values}${left ? `; ${left} channels are not shown` : ""}.`;
    $("channels-words").textContent = words;
    $("open-channel").hidden = layout === null;
    if (layout) {
      $("channel").max = layout.count - 1;
      $("channel").value = 0;
    }
    $("channels").hidden = false;
    $("sheet").setAttribute("aria-label", `Grid of the channels of ${activation.layer}`);
    announce(words);
  }

  /** One channel, enlarged, beside the part of the image that the model saw. */
  open(channel) {
    if (!this.sheet.order.includes(channel)) return;
    this.channel = channel;
    this.sheet.point(channel);
    $("channel").value = channel;
    const title = `Channel ${channel} of ${this.layer}`;
    $("channel-title").textContent = title;
    $("channel-values").textContent = this.valuesOf(channel);
    $("channel-canvas").setAttribute("aria-label", title);
    this.sheet.draw(channel, $("channel-canvas"));
    this.drawInput($("channel-photo"));
    $("channel-back").disabled = this.sheet.beside(channel, -1) === undefined;
    $("channel-next").disabled = this.sheet.beside(channel, 1) === undefined;
    if (!$("channel-view").open) $("channel-view").showModal();
  }

  valuesOf(channel) {
    const { activation, weight } = this.values;
    const words = `Mean activation ${number(activation[channel])}`;
    return weight ? `${words}, weight for ${this.target} ${signedNumber(weight[channel])}` : words;
  }

  drawInput(canvas) {
    const { bitmap, name } = state.image;
    const { seen, source, image } = state.shown ?? {};
    canvas.hidden = !bitmap || image !== state.image;
    if (canvas.hidden) return;
    const scale = bitmap.width / source.width;
    const [x, y, w, h] = seen.map((value) => value * scale);
    Object.assign(canvas, { width: Math.round(w), height: Math.round(h) });
    canvas.getContext("2d").drawImage(bitmap, x, y, w, h, 0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", `Model input of ${name}`);
  }
}

const fitOf = ({ fit }) => (fit ? [["fit", fit]] : []);

const number = (value) => Number(value.toPrecision(3)).toString().replace("-", "−");

const signedNumber = (value) => (value > 0 ? `+${number(value)}` : number(value));
