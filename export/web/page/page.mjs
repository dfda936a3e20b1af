// The page of an exported folder: a form, and a worker that runs the model. What a model says is set as text.

const $ = (id) => document.getElementById(id);
const say = (id, words) => ($(id).textContent = words);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const device = new URLSearchParams(location.search).get("device");
const worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });

let isRunning = false;

function setRunning(running) {
  isRunning = running;
  $("answer").ariaBusy = String(running);
  $("send").disabled = running;
  $("stop").disabled = !running;
}

const react = {
  progress({ done, total }) {
    $("bar").value = done / total;
    say("amount", `${megabytes(done)} of ${megabytes(total)}`);
    if (done === total) say("amount", `${megabytes(total)}, starting`);
  },
  ready({ name, tasks, where }) {
    say("base", name);
    say("where", where);
    $("task").append(new Option("none: the base model", ""), ...tasks.map((task) => new Option(task, task)));
    $("task").selectedIndex = Math.min(1, tasks.length);
    $("loading").hidden = true;
    $("form").hidden = false;
    $("prompt").focus();
  },
  token({ text }) {
    $("text").append(text);
  },
  done({ text, reason, tokens, seconds }) {
    $("text").append(text);
    const ends = { end: "the end of the text", length: "the longest answer", stop: "stopped" };
    say("outcome", `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second: ${ends[reason]}`);
    setRunning(false);
  },
  problem({ message }) {
    say("problem", message);
    $("loading").hidden = true;
    if (isRunning) say("outcome", "not complete");
    setRunning(false);
  },
};

worker.onmessage = ({ data }) => react[data.kind](data);
worker.onerror = (event) => react.problem({ message: `the worker did not start: ${event.message || "see the console"}` });

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (isRunning) return;
  const [task, prompt] = [$("task").value || null, $("prompt").value];
  for (const id of ["problem", "text", "outcome"]) say(id, "");
  say("answered", task ?? "base model");
  $("answer").hidden = false;
  setRunning(true);
  const settings = { task, maxNewTokens: Number($("tokens").value), temperature: Number($("temperature").value) };
  worker.postMessage({ kind: "generate", prompt, settings });
};

$("stop").onclick = () => worker.postMessage({ kind: "stop" });
document.onkeydown = (event) => {
  if (event.key === "Escape" && isRunning) $("stop").click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !isRunning) $("form").requestSubmit();
};

worker.postMessage({ kind: "open", device });
