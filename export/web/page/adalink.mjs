// Tasks before an unmodified base, in onnxruntime-web and in onnxruntime-node alike. One sequence at a time.
// The folder is what `adalink export web` wrote; web.json says what is in it.

const FORMAT = 1;

// What went wrong: `code` is one of missing, digest, format, secure, task, task-base, request, busy, tokenizer, result.
export class AdaLinkError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "AdaLinkError";
    this.code = code;
  }
}

function demand(holds, code, message) {
  if (!holds) throw new AdaLinkError(code, message);
}

// Read web.json. `read(path, count)` gives the bytes of a file of the folder, and calls `count` with how many came.
export async function readIndex(read) {
  let index;
  try {
    index = JSON.parse(new TextDecoder().decode(await read("web.json")));
  } catch (error) {
    demand(!(error instanceof SyntaxError), "format", "web.json is no JSON: export the folder again");
    throw error;
  }
  demand(index.format === FORMAT, "format", `web.json has format ${index.format}, not ${FORMAT}: export the folder again`);
  return index;
}

async function readFile(name, { size, pieces }, read, count) {
  demand(globalThis.crypto?.subtle, "secure", "digests need a secure context: serve the page over https, or on localhost");
  const data = new Uint8Array(size);
  let place = 0;
  for (const piece of pieces) {
    const bytes = await read(piece.path, count);
    const cure = "load it again, or export the folder again";
    demand(bytes.length === piece.size, "digest", `${piece.path} has ${bytes.length} bytes, not ${piece.size}: ${cure}`);
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    demand(`sha256:${hex}` === piece.sha256, "digest", `${piece.path} is not the file that was exported: ${cure}`);
    data.set(bytes, place);
    place += bytes.length;
  }
  return data;
}

// A safetensors file: {tensors: {name: {type, dims, data}}, metadata}. What is no such file, or no whole one, throws.
export function readSafetensors(bytes) {
  const types = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array] };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const { __metadata__: metadata = {}, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: ends }] of Object.entries(entries)) {
    const [type, Kind] = types[dtype];
    const [first, last] = ends.map((end) => bytes.byteOffset + start + end);
    const [size, end] = [shape.reduce((product, count) => product * count, 1), bytes.byteOffset + bytes.length];
    if (last > end || last - first !== size * Kind.BYTES_PER_ELEMENT) throw new RangeError(`${name} is not whole`);
    tensors[name] = { type, dims: shape, data: new Kind(bytes.buffer.slice(first, last)) };
  }
  return { tensors, metadata };
}

function wholeTask(bytes, name) {
  try {
    return readSafetensors(bytes);
  } catch {
    throw new AdaLinkError("task", `task ${name} is no whole safetensors file: load it again`);
  }
}

export class Model {
  #ort;
  #index;
  #front;
  #base;
  #tokenizer;
  #tasks = new Map();
  #isBusy = false;
  #otherTokens = ""; // of which text the library makes other tokens than the kit

  // Load a folder. `ort` is onnxruntime-web or onnxruntime-node, `Tokenizer` that of @huggingface/tokenizers.
  // `progress(done, total)` is called with bytes. `providers` run the base; the task always runs on the CPU.
  static async open({ ort, Tokenizer, read, providers = ["cpu"], progress = () => {} }) {
    const model = new Model();
    const index = await readIndex(read);
    const total = Object.values(index.files).reduce((sum, { size }) => sum + size, 0);
    let done = 0;
    const count = (bytes) => progress((done += bytes), total);
    const files = {};
    for (const [name, entry] of Object.entries(index.files)) files[name] = await readFile(name, entry, read, count);
    model.#ort = ort;
    model.#index = index;
    const json = (name) => JSON.parse(new TextDecoder().decode(files[name]));
    model.#tokenizer = new Tokenizer(json(index.tokenizer), {});
    for (const [text, ids] of index.check.texts) model.#compareTokens(text, ids);
    model.#front = await model.#start(index.front, files, ["cpu"]);
    model.#base = await model.#start(index.base, files, providers, index.base.cache.presents);
    model.#tasks.set(null, model.#weights(files[index.plain]));
    for (const [name, path] of Object.entries(index.tasks)) model.addTask(name, files[path]);
    await model.#check();
    return model;
  }

  get name() {
    return this.#index.name;
  }

  // Names of the tasks; without one, the base model answers.
  get tasks() {
    return Array.from(this.#tasks.keys()).filter((name) => name !== null);
  }

  // Add or replace a task: the bytes of a file in `tasks/` of a folder with the same base.
  addTask(name, bytes) {
    this.#tasks.set(name, this.#weights(bytes, name));
  }

  // Token ids of a text. Where the library makes other tokens than the kit, give `generate` token ids instead.
  encode(text) {
    demand(!this.#otherTokens, "tokenizer", this.#otherTokens);
    return this.#tokenizer.encode(text).ids;
  }

  decode(ids) {
    if (!ids.length) return ""; // the library refuses none
    return this.#tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  // Yields {token, text} for each token, then {reason, text}: "end" of the text, or "length". `text` is what is new.
  // With temperature 0 the likeliest token is taken; else one of all, drawn with `random`.
  async *generate(prompt, { task = null, maxNewTokens = 64, temperature = 0, random = Math.random } = {}) {
    const ids = typeof prompt === "string" ? this.encode(prompt) : Array.from(prompt ?? []);
    this.#checkRequest(ids, task, maxNewTokens, temperature);
    this.#isBusy = true;
    let caches = {};
    try {
      caches = this.#emptyCaches(ids.length + maxNewTokens);
      const stream = new TextStream(this);
      let [next, reason, length] = [ids, "length", ids.length];
      for (let made = 0; made < maxNewTokens; made++, length++) {
        const logits = await this.#step(next, length, this.#tasks.get(task), caches);
        const token = temperature > 0 ? draw(logits, temperature, random()) : likeliest(logits);
        if (this.#index.ends.includes(token)) {
          reason = "end";
          break;
        }
        yield { token, text: stream.push(token) };
        next = [token];
      }
      yield { reason, text: stream.finish() };
    } finally {
      Object.values(caches).forEach((tensor) => tensor.dispose());
      this.#isBusy = false;
    }
  }

  async close() {
    await Promise.all([this.#front.release(), this.#base.release()]);
  }

  #start({ graph, data }, files, executionProviders, onDevice = []) {
    const externalData = data.map((path) => ({ path, data: files[path] }));
    const isOnGpu = executionProviders.includes("webgpu");
    const preferredOutputLocation = isOnGpu && Object.fromEntries(onDevice.map((name) => [name, "gpu-buffer"]));
    const options = { executionProviders, externalData, ...(isOnGpu && { preferredOutputLocation }) };
    return this.#ort.InferenceSession.create(files[graph], options);
  }

  #weights(bytes, name) {
    const { tensors, metadata } = wholeTask(bytes, name);
    const { fingerprint, inputs, activations, width } = this.#index.front;
    const isOfBase = name === undefined || metadata.base_fingerprint === fingerprint;
    demand(isOfBase, "task-base", `task ${name} is for another base: export it from a deployment of ${this.name}`);
    const rank = tensors.down?.dims[1];
    const shapes = { down: [1, rank, width], up: [1, width, rank], down_bias: [1, 1, rank], up_bias: [1, 1, width] };
    const isTaken = inputs.every((input) => {
      const [type, dims] = input === "activation" ? ["int64", [1]] : ["float32", shapes[input]];
      return tensors[input]?.type === type && String(tensors[input].dims) === String(dims);
    });
    demand(isTaken, "task", `task ${name} is not what this folder takes: export it again with adalink export web`);
    const isKnown = activations.includes(Number(tensors.activation.data[0]));
    demand(isKnown, "task", `task ${name} has an activation that this folder does not compute: export them together`);
    return Object.fromEntries(inputs.map((input) => [input, this.#tensor(tensors[input])]));
  }

  #tensor({ type, data, dims }) {
    return new this.#ort.Tensor(type, data, dims);
  }

  #checkRequest(ids, task, maxNewTokens, temperature) {
    demand(this.#tasks.has(task), "request", `task ${task} is not in this folder, only ${this.tasks.join(", ")}`);
    demand(Number.isInteger(maxNewTokens) && maxNewTokens > 0, "request", "maxNewTokens is a whole number from 1 on");
    demand(temperature >= 0 && temperature < Infinity, "request", "temperature is a number from 0 on");
    const isKnown = ids.every((id) => Number.isInteger(id) && id >= 0 && id < this.#index.vocabulary);
    demand(ids.length > 0 && isKnown, "request", "the prompt is empty, or has token ids that the base does not know");
    const [wanted, most] = [ids.length + maxNewTokens, this.#index.positions];
    demand(wanted <= most, "request", `${ids.length} tokens and ${maxNewTokens} new ones are more than ${most}: ask for fewer`);
    demand(!this.#isBusy, "busy", "this model is generating: one sequence at a time");
  }

  #emptyCaches(positions) {
    const { pasts, heads, size } = this.#index.base.cache;
    const dims = [1, heads, positions, size];
    const make = () => this.#tensor({ type: "float32", data: new Float32Array(heads * positions * size), dims });
    return Object.fromEntries(pasts.map((name) => [name, make()]));
  }

  // Logits behind the last of `ids`, which end a sequence of `length` tokens. The caches are replaced.
  async #step(ids, length, weights, caches) {
    const whole = (numbers, dims) => this.#tensor({ type: "int64", data: BigInt64Array.from(numbers, BigInt), dims });
    const mask = this.#tensor({ type: "int64", data: new BigInt64Array(length).fill(1n), dims: [1, length] });
    const feeds = { input_ids: whole(ids, [1, ids.length]), attention_mask: mask, ...weights };
    const embedded = await this.#front.run(feeds);
    const { pasts, presents } = this.#index.base.cache;
    const inputs = Object.fromEntries(this.#index.base.inputs.map((name) => [name, embedded[name]]));
    const outputs = await this.#base.run({ ...inputs, ...caches });
    pasts.forEach((name, place) => {
      caches[name].dispose();
      caches[name] = outputs[presents[place]];
    });
    const logits = outputs.logits.data;
    demand(logits.every(Number.isFinite), "result", "the base gave no numbers: another provider may compute it right");
    return logits;
  }

  // Logits of one prompt, under the base model and each task, beside those of the kit: another table, graph or kernel
  // gives others. Rounding moves them by less than the tolerance.
  async #check() {
    const { prompt, logits } = this.#index.check;
    for (const [task, { ids, values, tolerance }] of logits) {
      const caches = this.#emptyCaches(prompt.length);
      const made = await this.#step(prompt, prompt.length, this.#tasks.get(task), caches);
      Object.values(caches).forEach((tensor) => tensor.dispose());
      const squares = ids.map((id, place) => (made[id] - values[place]) ** 2);
      const error = Math.sqrt(squares.reduce((sum, square) => sum + square) / squares.length);
      const what = task ?? "the base model";
      demand(error <= tolerance, "result", `${what}: logits are ${error} off those of the kit, more than ${tolerance}`);
    }
  }

  #compareTokens(text, expected) {
    const received = this.#tokenizer.encode(text).ids;
    if (String(received) === String(expected)) return;
    const what = `this library makes other tokens of ${JSON.stringify(text)}: ${received}, expected ${expected}`;
    this.#otherTokens = `${what}. Give token ids of the kit, not texts`;
  }
}

// The token with the highest logit; of equals, the first.
function likeliest(logits) {
  return logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
}

// A token of the softmax of logits over `temperature`, at `share` (from 0 to 1) of the summed probabilities.
export function draw(logits, temperature, share) {
  const most = logits[likeliest(logits)];
  const weights = Float64Array.from(logits, (value) => Math.exp((value - most) / temperature));
  let left = share * weights.reduce((sum, weight) => sum + weight);
  const drawn = weights.findIndex((weight) => (left -= weight) < 0);
  return drawn < 0 ? likeliest(logits) : drawn;
}

// Text of a growing list of tokens: a token may begin a word, or be part of a character.
class TextStream {
  #model;
  #context = [];
  #pending = [];

  constructor(model) {
    this.#model = model;
  }

  push(token) {
    this.#pending.push(token);
    return this.#settle(false);
  }

  finish() {
    return this.#settle(true);
  }

  #settle(isLast) {
    const before = this.#model.decode(this.#context);
    const after = this.#model.decode([...this.#context, ...this.#pending]);
    if (after.length <= before.length || (after.endsWith("\ufffd") && !isLast)) return "";
    const piece = after.startsWith(before) ? after.slice(before.length) : this.#model.decode(this.#pending);
    this.#context = this.#pending;
    this.#pending = [];
    return piece;
  }
}
