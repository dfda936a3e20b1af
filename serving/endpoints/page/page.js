// The page of `adalink serve`: asks several models the same, and shows their answers side by side as they come.
// What models and the server say is set as text, never as HTML.

const MOST_STREAMS = 5; // browsers keep six connections to a server: one is left for the load
const MOST_ODDS = 5; // first tokens that are shown
const KEY = "adalink-key";
const CUT = "The answer was cut off before its end.";

const $ = (id) => document.getElementById(id);
const [dialog, prompt] = [$("key-dialog"), $("prompt")];
const now = () => performance.now();
const say = (id, words) => ($(id).textContent = words);
const show = (id, isShown) => ($(id).hidden = !isShown);
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
const make = (tag, textContent, values) => Object.assign(document.createElement(tag), { textContent, ...values });
const checked = (name) => Array.from(document.querySelectorAll(`[name=${name}]:checked`), (box) => box.value);
const isChat = () => checked("mode")[0] === "chat";

class Problem extends Error {}

let server; // what page/state says
let image; // {name, url, bitmap} of the next prompt
let histories = new Map(); // model -> messages
const running = new Set(); // answers under way

async function request(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "TypeError" ? new Problem("The server does not answer. Is it still running?") : error;
  });
  if (response.ok) return response;
  if (response.status === 401) {
    askKey(key && "The server does not know this key.");
    throw new Problem("This server asks for an API key.");
  }
  const { error } = await response.json().catch(() => ({}));
  throw new Problem(error?.message || `The server answered ${response.status} ${response.statusText}.`);
}

let timer, last;

async function poll() {
  if (document.hidden) return;
  try {
    showState(await (await request("page/state", { signal: AbortSignal.timeout(10000) })).json());
  } catch (error) {
    last = null;
    say("offline", error instanceof Problem ? error.message : "The server takes long to answer.");
  }
  show("load", last);
  show("offline", !last);
  clearTimeout(timer);
  if (!dialog.open) timer = setTimeout(poll, 1000);
}

function showState(state) {
  const { tokens } = state;
  say("rate", last ? Math.round((1000 * (tokens - last.tokens)) / (now() - last.at)) : 0);
  last = { tokens, at: now() };
  for (const name of ["running", "waiting", "slots"]) say(name, state[name]);
  $("bar").style.width = `${(100 * state.running) / state.slots}%`;
  const before = server;
  server = state;
  if (String(state.models) !== String(before?.models)) showModels(before ? checked("model") : state.models.slice(0, 2));
  if (!before) showForm();
}

function askKey(problem) {
  show("change-key", true);
  say("key-problem", problem ?? "");
  if (!dialog.open) dialog.showModal();
}

$("change-key").onclick = () => askKey();
dialog.onclose = () => last && poll();
dialog.onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  dialog.close();
  poll();
};
document.onvisibilitychange = () => {
  last = null;
  poll();
};

function showModels(chosen) {
  const chips = server.models.map((name) => {
    const chip = make("label", "", { className: name === server.base ? "base" : "" });
    const box = make("input", "", { type: "checkbox", name: "model", value: name, checked: chosen.includes(name) });
    chip.append(box, make("span", name));
    return chip;
  });
  $("chips").replaceChildren(...chips);
  show("filter", chips.length > 12);
}

function showForm() {
  const { base, generates, classifies, chats, api } = server;
  say("base", base);
  document.title = `${base} · AdaLink`;
  if (!generates && !classifies) {
    say("call", `POST ${new URL(api, document.baseURI)}`);
    return show("api-only", true);
  }
  for (const id of ["models", "empty", "composer"]) show(id, true);
  show("modes", chats);
  show("toggle", generates);
  if (!chats) $("plain").checked = true;
  showMode();
  prompt.focus();
}

function showMode() {
  show("system-field", isChat());
  show("choose", server.sees && isChat());
  if (!isChat()) setImage();
}

function showSettings(isOpen) {
  show("settings", isOpen);
  $("toggle").ariaExpanded = isOpen;
}

$("modes").onchange = showMode;
$("toggle").onclick = () => showSettings($("settings").hidden);
$("filter").oninput = () => {
  for (const chip of $("chips").children) chip.hidden = !chip.textContent.includes($("filter").value);
};

$("file").onchange = async () => {
  const [file] = $("file").files;
  if (!file) return;
  say("problem", "");
  try {
    const reader = new FileReader();
    const url = await new Promise((resolve, reject) => {
      Object.assign(reader, { onload: () => resolve(reader.result), onerror: reject }).readAsDataURL(file);
    });
    setImage({ name: file.name, url, bitmap: await createImageBitmap(file, { resizeHeight: 160 }) });
  } catch {
    say("problem", `${file.name} is no image that this browser can read.`);
  }
  $("file").value = "";
};
$("remove").onclick = () => {
  setImage();
  $("file").focus();
};

function setImage(value) {
  image = value;
  show("image", image);
  if (image) $("image").firstElementChild.replaceWith(drawing());
  say("image-name", image?.name);
}

function drawing() {
  const { name, bitmap } = image;
  const canvas = make("canvas", "", { width: bitmap.width, height: bitmap.height, role: "img", ariaLabel: name });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas;
}

$("composer").onsubmit = async (event) => {
  event.preventDefault();
  const models = checked("model");
  const text = prompt.value;
  const numbers = [$("max_tokens"), $("temperature")];
  const wrong = numbers.find((field) => !field.validity.valid);
  const problem =
    (running.size && "Answers are still coming: wait for them, or stop them.") ||
    (!models.length && "Choose at least one model.") ||
    (!text.trim() && !image && "Write a prompt first.") ||
    (wrong && `${wrong.labels[0].innerText.trim()}: ${wrong.validationMessage}`);
  say("problem", problem || "");
  if (problem) {
    if (wrong) showSettings(true);
    return (wrong ?? prompt).focus();
  }
  const sent = image;
  const system = $("system").value.trim();
  const turn = {
    isChat: isChat(),
    content: sent ? [{ type: "text", text }, { type: "image_url", image_url: { url: sent.url } }] : text,
    system: system ? [{ role: "system", content: system }] : [],
    fields: isChat() ? { logprobs: true, top_logprobs: MOST_ODDS } : { prompt: text, logprobs: MOST_ODDS },
  };
  for (const { id, value } of numbers) if (value) turn.fields[id] = Number(value);
  const section = copy("turn");
  const answers = models.map((model) => new Answer(model, turn));
  section.children[1].textContent = text;
  if (image) section.children[1].after(drawing());
  section.lastElementChild.append(...answers.map((answer) => answer.card));
  $("turns").append(section);
  prompt.value = "";
  setImage();
  show("empty", false);
  show("restart", true);
  section.scrollIntoView();
  await Promise.all(answers.map((answer) => answer.ask()));
  if (answers.some((answer) => answer.reason !== "failed") || prompt.value || image) return;
  prompt.value = text; // to be sent again
  setImage(sent);
};

const queue = []; // answers that wait for a connection
let streams = 0;

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
    this.tell("waits for a connection");
    if (streams < MOST_STREAMS) streams += 1;
    else await new Promise((resolve) => queue.push(resolve));
    try {
      this.control.signal.throwIfAborted();
      this.tell("reads the prompt");
      await (server.classifies ? this.classify() : this.stream());
    } catch (error) {
      this.reason = error.name === "AbortError" ? "stopped" : "failed";
      if (this.reason === "failed") this.part(".bad").textContent = error instanceof Problem ? error.message : CUT;
    }
    if (queue.length) queue.shift()();
    else streams -= 1;
    this.end();
  }

  messages() {
    return [...(this.histories.get(this.model) ?? []), { role: "user", content: this.turn.content }];
  }

  post(path, body) {
    this.begun = now();
    return request(path, { method: "POST", body: JSON.stringify({ model: this.model, ...body }), signal: this.control.signal });
  }

  async classify() {
    const response = await this.post("v1/classify", { input: this.turn.content });
    const { label, labels, value, spans, probabilities, truncated } = (await response.json()).data[0];
    const found = labels ?? spans?.map((span) => `${span.label}: ${span.text}`) ?? [label ?? value];
    this.text.data = found.join("\n") || "none";
    this.reason = `${((now() - this.begun) / 1000).toFixed(2)} s${truncated ? " · text was cut" : ""}`;
    const odds = Object.entries(probabilities ?? {}).map(([name, share]) => [name, share, found.includes(name)]);
    if (odds.length) showOdds(this.part("details"), "Labels", odds).open = true;
  }

  async stream() {
    const { isChat, system, fields } = this.turn;
    const body = { ...fields, stream: true, stream_options: { include_usage: true } };
    if (isChat) body.messages = [...system, ...this.messages()];
    const response = await this.post(isChat ? "v1/chat/completions" : "v1/completions", body);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let held = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) throw new Problem(CUT);
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") return;
        this.take(JSON.parse(event.slice(6)));
      }
    }
  }

  take({ error, choices, usage }) {
    if (error) throw new Problem(error.message);
    this.tokens = usage?.completion_tokens ?? this.tokens;
    for (const { delta, text, logprobs, finish_reason } of choices) {
      this.reason = finish_reason;
      const count = (logprobs?.content ?? logprobs?.tokens)?.length;
      if (count) {
        this.last = now();
        if (!this.first) {
          [this.first, this.early] = [this.last, count];
          showOdds(this.part("details"), "First token", firstOdds(logprobs));
        }
        this.tokens += count;
      }
      this.text.appendData(delta?.content ?? text ?? "");
      this.tell();
    }
  }

  tell(words) {
    const { tokens, begun, first, early, last } = this;
    const rate = (1000 * (tokens - early)) / (last - first);
    const facts = [
      first && `first token ${((first - begun) / 1000).toFixed(2)} s`,
      first && `${tokens} token${tokens === 1 ? "" : "s"}`,
      rate > 0 && rate < Infinity && `${rate.toFixed(1)} tokens/s`,
      words,
    ];
    this.part(".stats").textContent = facts.filter(Boolean).map((fact) => fact.replaceAll(" ", "\u00a0")).join("\u00a0· ");
  }

  end() {
    const { model, turn, reason, histories } = this;
    const text = this.text.data;
    running.delete(this);
    showRunning();
    this.card.ariaBusy = "false";
    this.part(".stop").hidden = true;
    this.tell({ length: "token limit", stop: text ? "" : "0 tokens" }[reason] ?? reason);
    if (turn.isChat && text && reason !== "failed") {
      histories.set(model, [...this.messages(), { role: "assistant", content: text }]);
    }
    if (reason === "stop" && !text) {
      const hint = turn.isChat ? " A task that was trained on plain texts answers in the form “Plain”." : "";
      this.part(".text").append(make("em", `The model ended at once.${hint}`));
    }
    // Screen readers read an answer once, when it is complete.
    $("news").append(make("p", `${model}, ${reason}: ${this.part(".text").textContent} ${this.part(".bad").textContent}`));
  }
}

// Odds of the first token of a chat or of a plain prompt: [token, probability, whether it was chosen].
function firstOdds({ content, tokens, token_logprobs, top_logprobs }) {
  const [first] = content ?? [{ token: tokens?.[0], logprob: token_logprobs?.[0] }];
  const odds = new Map(content ? first.top_logprobs.map((top) => [top.token, top.logprob]) : Object.entries(top_logprobs[0]));
  odds.set(first.token, first.logprob);
  const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎");
  return Array.from(odds, ([text, logprob]) => [visible(text), Math.exp(logprob), text === first.token]);
}

// A foldable list of probabilities.
function showOdds(details, title, odds) {
  const items = odds.sort((one, other) => other[1] - one[1]).slice(0, 10).map(([text, probability, isChosen]) => {
    const share = `${(100 * probability).toFixed(1)}%`;
    const item = make("li", "", { className: isChosen ? "chosen" : "" });
    const track = make("span", "", { className: "track" });
    track.appendChild(make("i")).style.width = share;
    item.append(make("code", text), track, make("span", share));
    return item;
  });
  details.firstElementChild.textContent = title;
  details.lastElementChild.replaceChildren(...items);
  details.hidden = false;
  return details;
}

function showRunning() {
  if (!running.size && document.activeElement === $("stop-all")) prompt.focus();
  show("stop-all", running.size);
  show("send", !running.size);
}

function stopAll() {
  for (const answer of running) answer.stop();
}

$("stop-all").onclick = stopAll;
$("restart").onclick = () => {
  stopAll();
  histories = new Map();
  $("turns").replaceChildren();
  show("restart", false);
  show("empty", true);
  prompt.focus();
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !dialog.open) stopAll();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("composer").contains(event.target)) $("composer").requestSubmit();
};

poll();
