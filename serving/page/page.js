// The page of `adalink serve`: asks several models the same, and shows their answers side by side as they come.
// What models and the server say is set as text, never as HTML.

const MOST_STREAMS = 5; // browsers keep six connections to a server: one is left for the load
const MOST_ODDS = 5; // first tokens that are shown
const FILTER_FROM = 13; // models
const KEY = "adalink-key";

const find = (id) => document.getElementById(id);
const copy = (id) => find(id).content.firstElementChild.cloneNode(true);
const make = (tag, text = "", values = {}) => Object.assign(document.createElement(tag), { textContent: text }, values);
const checked = (name) => Array.from(document.querySelectorAll(`[name=${name}]:checked`), (box) => box.value);
const isChat = () => checked("mode")[0] === "chat";
const sentence = (words) => words[0].toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");

class Problem extends Error {}

let server; // what page/state says
let image; // {name, url, bitmap} of the next prompt
let histories = new Map(); // model -> messages
const running = new Set(); // answers under way

// The server: requests, its load, keys

async function request(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "TypeError" ? new Problem("The server does not answer. Is it still running?") : error;
  });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401) askKey(key ? "The server does not know this key." : "");
  const retry = response.headers.get("Retry-After");
  const words = error?.message || `the server answered ${response.status} ${response.statusText}`;
  throw new Problem(sentence(words) + (retry ? ` Try again in ${retry} s.` : ""));
}

let timer, isPolling, last;

async function poll() {
  clearTimeout(timer);
  if (isPolling || document.hidden) return;
  isPolling = true;
  try {
    const response = await request("page/state", { signal: AbortSignal.timeout(10000) });
    showState(await response.json());
  } catch (error) {
    last = null;
    find("offline").textContent = error instanceof Problem ? error.message : "The server takes long to answer.";
  }
  find("load").hidden = !last;
  find("offline").hidden = !!last;
  isPolling = false;
  if (!find("key-dialog").open) timer = setTimeout(poll, 1000);
}

function showState(state) {
  const now = { tokens: state.tokens, at: performance.now() };
  find("rate").textContent = last ? Math.round((1000 * (now.tokens - last.tokens)) / (now.at - last.at)) : 0;
  last = now;
  for (const name of ["running", "waiting", "slots"]) find(name).textContent = state[name];
  find("bar").style.width = `${(100 * state.running) / state.slots}%`;
  const before = server;
  server = state;
  if (String(state.models) !== String(before?.models)) showModels(before ? checked("model") : [state.base, state.models[1]]);
  if (!before) showForm();
}

function askKey(problem) {
  find("change-key").hidden = false;
  find("key-problem").textContent = problem;
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

find("change-key").onclick = () => askKey("");
find("key-dialog").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value.trim());
  find("key").value = "";
  find("key-dialog").close();
  poll();
};
document.onvisibilitychange = () => {
  last = null;
  poll();
};

// Models and the form

function showModels(chosen) {
  const { base, models } = server;
  find("chips").replaceChildren(
    ...models.map((name) => {
      const chip = make("label", "", { className: name === base ? "base" : "" });
      chip.append(make("input", "", { type: "checkbox", name: "model", value: name, checked: chosen.includes(name) }), make("span", name));
      return chip;
    }),
  );
  find("filter").hidden = models.length < FILTER_FROM;
}

function showForm() {
  const { base, kind, generates, chats } = server;
  find("base").textContent = base;
  document.title = `${base} · AdaLink`;
  if (!generates) {
    const [title, text, call] = find("api-only").children;
    const isEncoder = kind === "encoder";
    title.textContent = isEncoder ? `${base} is an encoder` : `${base} has no tokenizer`;
    text.textContent = `It ${isEncoder ? "gives the states of a text and writes none" : "takes token ids"}. Ask it through the API:`;
    call.textContent = `POST ${new URL(`v2/models/${encodeURIComponent(base)}/infer`, document.baseURI)}`;
    find("api-only").hidden = false;
    return;
  }
  for (const id of ["models", "empty", "composer"]) find(id).hidden = false;
  find("modes").hidden = !chats;
  if (!chats) document.querySelector("[value=plain]").checked = true;
  showMode();
  find("prompt").focus();
}

function showMode() {
  find("system-field").hidden = !isChat();
  find("choose").hidden = !server.sees || !isChat();
  if (!isChat()) setImage();
}

function openSettings(isOpen) {
  find("settings").hidden = !isOpen;
  find("toggle").ariaExpanded = isOpen;
}

find("modes").onchange = showMode;
find("toggle").onclick = () => openSettings(find("settings").hidden);
find("filter").oninput = ({ target }) => {
  for (const chip of find("chips").children) chip.hidden = !chip.textContent.includes(target.value);
};

find("file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  find("problem").textContent = "";
  try {
    if (file.size * 1.4 > server.body_bytes) throw new Problem(`${file.name} is larger than this server takes.`);
    const url = await new Promise((resolve, reject) => {
      const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: reject });
      reader.readAsDataURL(file);
    });
    setImage({ name: file.name, url, bitmap: await createImageBitmap(file, { resizeHeight: 160 }) });
  } catch (error) {
    find("problem").textContent = error instanceof Problem ? error.message : `${file.name} is no image that this browser can read.`;
  }
  target.value = "";
};
find("image").querySelector("button").onclick = () => {
  setImage();
  find("file").focus();
};

function setImage(value) {
  image = value;
  find("image").hidden = !image;
  if (!image) return;
  draw(find("image").querySelector("canvas"));
  find("image").querySelector("span").textContent = image.name;
}

function draw(canvas) {
  Object.assign(canvas, { width: image.bitmap.width, height: image.bitmap.height, role: "img", ariaLabel: image.name });
  canvas.getContext("2d").drawImage(image.bitmap, 0, 0);
  return canvas;
}

// Asking

find("composer").onsubmit = (event) => {
  event.preventDefault();
  const models = checked("model");
  const text = find("prompt").value;
  const fields = [find("max_tokens"), find("temperature")];
  const wrong = fields.find((field) => !field.validity.valid);
  find("problem").textContent =
    (running.size && "Answers are still coming: wait for them, or stop them.") ||
    (!models.length && "Choose at least one model.") ||
    (!text.trim() && !image && "Write a prompt first.") ||
    (wrong && `${wrong.labels[0].innerText.trim()}: ${wrong.validationMessage}`) ||
    "";
  if (find("problem").textContent) {
    if (wrong) openSettings(true);
    (wrong ?? find("prompt")).focus();
    return;
  }
  const turn = {
    text,
    isChat: isChat(),
    system: find("system").value.trim(),
    content: image ? [{ type: "text", text }, { type: "image_url", image_url: { url: image.url } }] : text,
    settings: Object.fromEntries(fields.filter((field) => field.value).map((field) => [field.id, Number(field.value)])),
  };
  const section = copy("turn");
  section.children[1].textContent = text;
  if (image) section.children[1].after(draw(make("canvas")));
  const answers = models.map((model) => new Answer(model, turn));
  section.lastElementChild.append(...answers.map((answer) => answer.card));
  find("turns").append(section);
  find("prompt").value = "";
  find("empty").hidden = true;
  find("restart").hidden = false;
  setImage();
  section.scrollIntoView();
  for (const answer of answers) answer.ask();
};

const queue = []; // answers that wait for a connection
let streams = 0;

async function connect() {
  if (streams < MOST_STREAMS) streams += 1;
  else await new Promise((resolve) => queue.push(resolve));
}

class Answer {
  constructor(model, turn) {
    Object.assign(this, { model, turn, histories, tokens: 0, text: new Text(), control: new AbortController() });
    this.card = copy("answer");
    this.card.ariaLabel = this.part("h3").textContent = model;
    this.part(".text").append(this.text);
    this.part(".stop").ariaLabel = `Stop ${model}`;
    this.part(".stop").onclick = () => this.stop();
    running.add(this);
    showRunning();
  }

  part(selector) {
    return this.card.querySelector(selector);
  }

  stop() {
    if (this.card.contains(document.activeElement)) this.card.focus();
    this.control.abort();
  }

  async ask() {
    this.show("waits for a connection");
    await connect();
    try {
      this.control.signal.throwIfAborted();
      this.show("reads the prompt");
      await this.stream();
    } catch (error) {
      this.reason = error.name === "AbortError" ? "stopped" : "failed";
      this.part(".bad").hidden = this.reason === "stopped";
      this.part(".bad").textContent = error instanceof Problem ? error.message : "The answer was cut off before its end.";
    }
    (queue.shift() ?? (() => (streams -= 1)))();
    this.end();
  }

  async stream() {
    const { text, settings, isChat } = this.turn;
    const body = isChat ? { messages: this.messages(), logprobs: true, top_logprobs: MOST_ODDS } : { prompt: text, logprobs: MOST_ODDS };
    const common = { model: this.model, stream: true, stream_options: { include_usage: true }, ...settings };
    this.begun = performance.now();
    const response = await request(isChat ? "v1/chat/completions" : "v1/completions", {
      method: "POST",
      body: JSON.stringify({ ...common, ...body }),
      signal: this.control.signal,
    });
    let data;
    for await (data of events(response.body)) if (data !== "[DONE]") this.take(JSON.parse(data));
    if (data !== "[DONE]") throw new Problem("The answer was cut off before its end.");
  }

  messages() {
    const { system, content } = this.turn;
    const first = system ? [{ role: "system", content: system }] : [];
    return [...first, ...(this.histories.get(this.model) ?? []), { role: "user", content }];
  }

  take({ error, choices, usage }) {
    if (error) throw new Problem(sentence(error.message));
    this.tokens = usage?.completion_tokens ?? this.tokens;
    for (const { delta, text, logprobs, finish_reason } of choices) {
      this.reason = finish_reason;
      const count = (logprobs?.content ?? logprobs?.tokens ?? []).length;
      if (count) {
        this.last = performance.now();
        if (!this.first) {
          [this.first, this.early] = [this.last, count];
          showOdds(this.part("details"), "First token", ...firstOdds(logprobs));
        }
        this.tokens += count;
      }
      this.text.appendData(delta?.content ?? text ?? "");
      this.show();
    }
  }

  show(words) {
    const facts = [];
    if (this.first) facts.push(`first token ${time(this.first - this.begun)}`, `${this.tokens} tokens`);
    const rate = (1000 * (this.tokens - this.early)) / (this.last - this.first);
    if (rate > 0 && rate < Infinity) facts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    if (words) facts.push(words);
    this.part(".stats").textContent = facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
  }

  end() {
    const { model, turn, reason } = this;
    const text = this.text.data;
    const isOver = reason === "stop" || reason === "length";
    running.delete(this);
    showRunning();
    this.card.ariaBusy = "false";
    this.part(".stop").hidden = true;
    this.show(reason === "length" ? "token limit" : reason === "stop" ? "" : reason);
    if (turn.isChat && text && reason !== "failed") {
      const messages = [{ role: "user", content: turn.content }, { role: "assistant", content: text }];
      this.histories.set(model, [...(this.histories.get(model) ?? []), ...messages]);
    }
    if (isOver && !text) {
      const hint = turn.isChat ? " A task that was trained on plain texts answers in the form “Plain”." : "";
      this.part(".text").append(make("em", `The model ended at once.${hint}`));
    }
    announce(`${model}: ${this.part(".text").textContent} ${isOver ? "" : reason}. ${this.part(".bad").textContent}`);
  }
}

const time = (ms) => (ms < 999.5 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

// Data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = (held + value).split("\n\n");
    held = pieces.pop();
    for (const piece of pieces) yield piece.replace("data: ", "");
  }
}

// The first token and [token, log probability] of it and its alternatives, of a chat or of a plain prompt.
function firstOdds({ content, tokens, token_logprobs, top_logprobs }) {
  const [chosen, logprob] = content ? [content[0].token, content[0].logprob] : [tokens[0], token_logprobs[0]];
  const odds = content ? content[0].top_logprobs.map((top) => [top.token, top.logprob]) : Object.entries(top_logprobs[0]);
  if (!odds.some(([text]) => text === chosen)) odds.push([chosen, logprob]);
  return [chosen, odds.sort((one, other) => other[1] - one[1])];
}

// A foldable list of probabilities. Labels of a task go in here too, with another title.
function showOdds(details, title, chosen, odds) {
  details.firstElementChild.textContent = title;
  details.lastElementChild.replaceChildren(
    ...odds.map(([text, logprob]) => {
      const percent = 100 * Math.exp(logprob);
      const item = make("li", "", { className: text === chosen ? "chosen" : "" });
      const track = make("span", "", { className: "track" });
      track.appendChild(make("i")).style.width = `${percent}%`;
      item.append(make("code", text.replaceAll(" ", "␣").replaceAll("\n", "⏎")), track, make("span", `${percent.toFixed(1)} %`));
      return item;
    }),
  );
  details.hidden = false;
}

// Screen readers read an answer once, when it is complete.
function announce(words) {
  find("news").append(make("p", words));
  if (find("news").children.length > MOST_STREAMS) find("news").firstChild.remove();
}

// Stopping and beginning anew

function showRunning() {
  if (!running.size && document.activeElement === find("stop-all")) find("prompt").focus();
  find("stop-all").hidden = !running.size;
  find("send").hidden = !!running.size;
}

function stopAll() {
  for (const answer of running) answer.stop();
}

find("stop-all").onclick = stopAll;
find("restart").onclick = () => {
  stopAll();
  histories = new Map();
  find("turns").replaceChildren();
  find("restart").hidden = true;
  find("empty").hidden = false;
  find("prompt").focus();
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !find("key-dialog").open) stopAll();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && find("composer").contains(event.target)) find("composer").requestSubmit();
};

poll();
