// Runs a model that `sessa export --for web` wrote, in a page or in node, and wires up the page.
//
// Letters: T new tokens, P cached rows, V vocabulary. ONNX Runtime and the tokenizer are handed in,
// so that the same class runs on WebAssembly, on WebGPU and in node.

// WebGPU cannot take empty tensors: the caches begin with one row of zeros that the mask hides.
const HIDDEN_ROWS = 1;
// A long prompt goes through in pieces, so that logits stay small and the page stays alive.
const CHUNK = 128;

/** A model with its caches; one text at a time. */
export class SessaModel {
  /**
   * read(name) gives the bytes of a file of the exported folder; provider is "wasm", "webgpu" or,
   * in onnxruntime-node, "cpu".
   */
  static async load({ ort, Tokenizer, read, provider }) {
    const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
    const info = await json("web.json");
    const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
    const session = await ort.InferenceSession.create(await read(info.model), {
      executionProviders: [provider],
      // On WebGPU the caches stay on the device.
      ...(provider === "webgpu" && { preferredOutputLocation: "gpu-buffer" }),
    });
    return new SessaModel(ort, session, tokenizer, info);
  }

  constructor(ort, session, tokenizer, info) {
    Object.assign(this, { ort, session, tokenizer, info });
    this.caches = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values"));
    this.reset();
  }

  /** Forget everything read. */
  reset() {
    for (const tensor of Object.values(this.past ?? {})) tensor.dispose();
    this.length = 0;
    this.past = {};
    for (const { name, shape } of this.caches) {
      const dims = [1, shape[1], HIDDEN_ROWS, shape[3]];
      this.past[name] = new this.ort.Tensor("float32", new Float32Array(shape[1] * shape[3]), dims);
    }
  }

  /** Token ids of a text, behind those that begin one for this model. */
  encode(text) {
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    return ids.length ? [...(this.info.prefix ?? []), ...Array.from(ids, Number)] : [this.info.begin];
  }

  /** Append T tokens and return the logits (V) of the last. */
  async read(ids) {
    const { Tensor } = this.ort;
    const T = ids.length;
    const mask = new BigInt64Array(HIDDEN_ROWS + this.length + T).fill(1n).fill(0n, 0, HIDDEN_ROWS);
    const found = await this.session.run({
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, T]),
      attention_mask: new Tensor("int64", mask, [1, mask.length]),
      ...this.past,
    });
    for (const { name } of this.caches) {
      this.past[name].dispose();
      this.past[name] = found[name.replace("past_key_values", "present")];
    }
    this.length += T;
    const logits = await found.logits.getData();
    return logits.slice(logits.length - found.logits.dims[2]);
  }

  /**
   * Continue token ids from an empty cache; yields ids until one that ends a text, maxTokens, the
   * end of the context, or signal. temperature 0 takes the likeliest token.
   */
  async *tokens(ids, { maxTokens = 200, temperature = 0.8, topK = 40, signal } = {}) {
    const room = this.info.context - ids.length;
    if (room < 1)
      throw new RangeError(`the text has ${ids.length} tokens, the model reads ${this.info.context}`);
    this.reset();
    let logits;
    for (let start = 0; start < ids.length; start += CHUNK) {
      if (signal?.aborted) return;
      logits = await this.read(ids.slice(start, start + CHUNK));
    }
    for (let left = Math.min(maxTokens, room); left > 0; left--) {
      const token = pick(logits, temperature, topK);
      if (signal?.aborted || this.info.stop.includes(token)) return;
      yield token;
      if (left > 1) logits = await this.read([token]);
    }
  }

  /** Continue a text; yields {text, tokens}: a piece and the number of tokens so far. */
  async *write(prompt, options) {
    const ids = [];
    let sent = 0;
    const piece = (held) => {
      const text = this.tokenizer.decode(ids, { skip_special_tokens: true });
      const sure = text.replace(held, "");
      const rest = sure.slice(sent);
      sent = sure.length;
      return { text: rest, tokens: ids.length };
    };
    for await (const token of this.tokens(this.encode(prompt), options)) {
      ids.push(token);
      // A character of several bytes may come in several tokens: its first ones decode to U+FFFD.
      yield piece(/\uFFFD+$/);
    }
    yield piece("");
  }
}

function pick(logits, temperature, topK) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (temperature <= 0) return best;
  const kept = Math.min(topK || logits.length, logits.length);
  const least = logits.slice().sort()[logits.length - kept];
  const weights = logits.map((x) => (x < least ? 0 : Math.exp((x - logits[best]) / temperature)));
  let rest = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let i = 0; i < weights.length; i++) if ((rest -= weights[i]) < 0) return i;
  return best;
}

const RUNTIMES = { wasm: "./lib/ort.wasm.bundle.min.mjs", webgpu: "./lib/ort.webgpu.bundle.min.mjs" };
const LABELS = { wasm: "WebAssembly", webgpu: "WebGPU" };
// Often enough for the eye.
const FRAME_MS = 30;

/** The page of index.html: its controls and the one model that it has loaded. */
class Page {
  constructor() {
    this.at = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
    const { at } = this;
    at.write.onclick = () => (this.stop ? this.stop.abort() : this.write());
    at.clear.onclick = () => this.clear();
    at.text.onkeydown = (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      if (!at.write.disabled) at.write.click();
    };
    at.device.onchange = () => this.load();
    for (const name of ["temperature", "length"]) at[name].oninput = () => this.settings();
    this.settings();
    at.text.focus();
  }

  async start() {
    const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
    this.at.webgpu.disabled = !adapter;
    if (!adapter) this.at.webgpu.title = "This browser offers no WebGPU adapter";
    const asked = new URLSearchParams(location.search).get("device");
    if (asked === "webgpu" && adapter) this.at.device.value = asked;
    await this.load();
  }

  async load() {
    const { at } = this;
    const device = at.device.value;
    this.state("loading", `Loading the model for ${LABELS[device]}…`);
    try {
      const [ort, { Tokenizer }] = await Promise.all([
        import(RUNTIMES[device]),
        import("./lib/tokenizers.min.mjs"),
      ]);
      ort.env.wasm.wasmPaths = new URL("./lib/", location.href).href;
      const read = (name) => this.fetch(`./model/${name}`);
      await this.model?.session.release();
      this.model = null;
      this.model = await SessaModel.load({ ort, Tokenizer, read, provider: device });
    } catch (error) {
      return this.state("failed", `The model cannot be loaded: ${error.message}`);
    }
    const { info } = this.model;
    const size = `${info.dtype}, ${(info.bytes / 1e6).toFixed(1)} MB`;
    at.about.textContent = `${compact(info.parameters)} parameters · ${size}`;
    at.length.max = info.context;
    at.room.textContent = info.context;
    this.state("ready", "Ready. Nothing you type leaves this page.");
  }

  /** A file's bytes; the bar shows how much of it is there. */
  async fetch(url) {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
    const total = Number(response.headers.get("content-length"));
    const parts = [];
    let size = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      size += value.length;
      this.at.loading.value = total ? size / total : 0;
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  }

  /** Let the model continue what stands on the paper; its own words are marked. */
  async write() {
    const { at, model } = this;
    const mark = document.createElement("mark");
    const prompt = at.text.textContent;
    const stop = (this.stop = new AbortController());
    at.text.append(mark);
    this.state("writing", "Writing…");
    const began = performance.now();
    let [first, painted, written] = [0, began, 0];
    try {
      const options = { ...this.options, signal: stop.signal };
      for await (const { text, tokens } of model.write(prompt, options)) {
        mark.append(text);
        written = tokens;
        first ||= performance.now();
        if (performance.now() - painted < FRAME_MS) continue;
        this.measure(written, first, began);
        await new Promise(requestAnimationFrame);
        painted = performance.now();
      }
      this.measure(written, first, began);
      this.state("ready", `${written} tokens ${stop.signal.aborted ? "until you stopped" : "written"}.`);
    } catch (error) {
      this.state("ready", error.message);
    }
    this.stop = null;
  }

  measure(written, first, began) {
    const { at, model } = this;
    const seconds = (performance.now() - first) / 1000;
    if (written > 1) at.speed.textContent = ((written - 1) / seconds).toFixed(1);
    at.wait.textContent = Math.max(Math.round(first - began), 0);
    at.used.textContent = model.length;
    at.meter.value = model.length / model.info.context;
  }

  clear() {
    this.stop?.abort();
    this.at.text.replaceChildren();
    this.at.text.focus();
  }

  settings() {
    const { at } = this;
    this.options = { temperature: at.temperature.valueAsNumber, maxTokens: at.length.valueAsNumber };
    at.temperatureValue.textContent = this.options.temperature.toFixed(1);
    at.lengthValue.textContent = this.options.maxTokens;
  }

  /** One of loading, ready, writing and failed, with a sentence for people. */
  state(name, message) {
    const { at } = this;
    document.body.dataset.state = name;
    at.status.textContent = message;
    at.loading.hidden = name !== "loading";
    at.write.disabled = name === "loading" || name === "failed";
    at.write.textContent = name === "writing" ? "Stop" : "Write";
    at.device.disabled = name === "writing" || name === "loading";
    at.text.contentEditable = name === "writing" ? "false" : "plaintext-only";
  }
}

function compact(number) {
  return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(number);
}

if (globalThis.document) new Page().start();
