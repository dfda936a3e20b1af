// Runs the model beside the page, so that the page stays responsive.

import { AdaLinkError, Model } from "./adalink.mjs";

const MOST_THREADS = 4;
let model;
let isStopped = false;

// Bytes of a file; `count` is called with each part's size.
async function read(path, count = () => {}) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) {
    const answer = response ? `the server answered ${response.status}` : "the server does not answer";
    throw new AdaLinkError("missing", `${path}: ${answer}. Upload the whole folder, and load the page again`);
  }
  const parts = [];
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      count(value.length);
    }
  } catch {
    throw new AdaLinkError("missing", `${path}: the connection broke off. Load the page again`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load(name) {
  try {
    return await import(`./lib/${name}`);
  } catch {
    const cure = "export the folder again with --libraries node_modules";
    throw new AdaLinkError("missing", `lib/${name} is not there or does not load: ${cure}`);
  }
}

async function open(device) {
  const progress = (done, total) => postMessage({ kind: "progress", done, total });
  const { Tokenizer } = await load("tokenizers.min.mjs");
  const adapter = device === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  let note = "";
  if (adapter) {
    try {
      return await start("webgpu", Tokenizer, progress, "WebGPU");
    } catch (error) {
      if (error instanceof AdaLinkError && error.code !== "result") throw error;
      console.warn(error);
      note = ", since WebGPU did not run this model right";
    }
  }
  const threads = crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
  return start("wasm", Tokenizer, progress, `WebAssembly, threads: ${threads}${note}`, threads);
}

async function start(provider, Tokenizer, progress, where, threads = 1) {
  const ort = await load(`ort.${provider}.min.mjs`);
  ort.env.wasm.wasmPaths = new URL("lib/", import.meta.url).href;
  ort.env.wasm.numThreads = threads;
  model = await Model.open({ ort, Tokenizer, read, providers: [provider], progress });
  model.encode(""); // refused where the tokenizer is not the kit's
  postMessage({ kind: "ready", name: model.name, tasks: model.tasks, where });
}

async function generate(prompt, settings) {
  const begun = performance.now();
  let [tokens, last] = [0, { reason: "stop", text: "" }];
  isStopped = false;
  for await (const piece of model.generate(prompt, settings)) {
    if (piece.reason) last = piece;
    else postMessage({ kind: "token", ...piece, number: ++tokens });
    await turn();
    if (isStopped) break;
  }
  postMessage({ kind: "done", ...last, tokens, seconds: (performance.now() - begun) / 1000 });
}

// Lets messages in, which promises alone do not.
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(null);
  });
}

onmessage = ({ data }) => {
  if (data.kind === "stop") return void (isStopped = true);
  const work = data.kind === "open" ? open(data.device) : generate(data.prompt, data.settings);
  work.catch((error) => postMessage({ kind: "problem", code: error.code, message: error.message ?? String(error) }));
};
