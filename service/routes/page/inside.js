/** The section "Inside a layer": requests a layer's channels and opens one of them. */

import { query, request } from "./api.js";
import { Sheet } from "./channels.js";
import { announce, failed } from "./notices.js";
import { shapeWords } from "./stage.js";
import { $, state } from "./state.js";

export class Inside {
  constructor() {
    this.channel = 0;
    this.sheet = new Sheet($("sheet"), (channel) => this.open(channel));
    $("inside-show").addEventListener("click", () => this.ask());
    $("channel").addEventListener("input", () => {
      if ($("channel").validity.valid) this.sheet.point($("channel").valueAsNumber);
    });
    $("open-channel").addEventListener("submit", (event) => {
      event.preventDefault();
      this.open($("channel").valueAsNumber);
    });
    $("channel-back").addEventListener("click", () => this.open(this.channel - 1));
    $("channel-next").addEventListener("click", () => this.open(this.channel + 1));
    $("channel-view").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.open(this.channel - 1);
      if (event.key === "ArrowRight") this.open(this.channel + 1);
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
    this.clear();
  }

  /** Shows nothing until the next request. */
  clear() {
    this.pending?.abort();
    $("inside-show").removeAttribute("aria-busy");
    $("channels").hidden = true;
    $("channels").dataset.request = "";
    $("channel-view").close();
  }

  async ask() {
    const { image } = state;
    if (!image || !state.model) return;
    this.pending?.abort();
    const pending = new AbortController();
    this.pending = pending;
    const layer = $("inside-layer").value;
    const pairs = [["model", state.model.name], ["activations", layer], ["activation_as", "image"], ["activation_as", "stats"]];
    $("inside-show").setAttribute("aria-busy", "true");
    try {
      const answer = await request(`predict?${query(pairs)}`, { body: image.file, signal: pending.signal });
      await this.show(answer.results[0].activations[0], pending.signal);
      if (!pending.signal.aborted) $("channels").dataset.request = answer.id;
    } catch (error) {
      if (error.name !== "AbortError") failed(error, () => this.ask(), $("inside-failure"));
    } finally {
      if (this.pending === pending) $("inside-show").removeAttribute("aria-busy");
    }
  }

  async show(activation, signal) {
    await this.sheet.show(activation);
    if (signal.aborted) return;
    this.layer = activation.layer;
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
    const { count } = this.sheet.layout;
    if (!(channel >= 0 && channel < count)) return;
    this.channel = channel;
    this.sheet.point(channel);
    $("channel").value = channel;
    const title = `Channel ${channel} of ${this.layer}`;
    $("channel-title").textContent = title;
    $("channel-canvas").setAttribute("aria-label", title);
    this.sheet.draw(channel, $("channel-canvas"));
    this.drawInput($("channel-photo"));
    $("channel-back").disabled = channel === 0;
    $("channel-next").disabled = channel === count - 1;
    if (!$("channel-view").open) $("channel-view").showModal();
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

const number = (value) => Number(value.toPrecision(3)).toString();
