// Generate text in Node from a folder of `adalink export web`.
//
//   npm ci --ignore-scripts
//   node generate.mjs FOLDER --task topics "Text: corn fell. Topic:"
//   echo '[{"prompt": [5, 7], "task": "topics"}, {"prompt": "Hello"}]' | node generate.mjs FOLDER --json

import { readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { text as readAll } from "node:stream/consumers";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const options = { task: { type: "string" }, tokens: { type: "string", default: "64" }, json: { type: "boolean" } };
const { values, positionals } = parseArgs({ options, allowPositionals: true });
const folder = resolve(positionals[0] ?? ".");
const { AdaLinkError, Model } = await import(pathToFileURL(join(folder, "adalink.mjs"))).catch(() => {
  console.error(`missing: ${folder} holds no adalink.mjs. Name a folder that adalink export web wrote`);
  process.exit(2);
});

async function read(path, count = () => {}) {
  const bytes = await readFile(join(folder, path)).catch(({ code }) => {
    throw new AdaLinkError("missing", `${path}: ${code}. Copy the whole folder`);
  });
  count(bytes.length);
  return bytes;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch ({ message }) {
    throw new AdaLinkError("request", `standard input is no JSON: ${message}`);
  }
}

async function answer(model, { prompt, ...settings }, write) {
  const result = { tokens: [], text: "" };
  for await (const { token, text, reason } of model.generate(prompt, settings)) {
    if (token !== undefined) result.tokens.push(token);
    result.text += text;
    result.reason = reason;
    write(text);
  }
  return result;
}

try {
  const model = await Model.open({ ort, Tokenizer, read });
  const maxNewTokens = Number(values.tokens);
  if (values.json) {
    const answers = [];
    for (const request of parse(await readAll(process.stdin)))
      answers.push(await answer(model, { maxNewTokens, ...request }, () => {}));
    console.log(JSON.stringify(answers));
  } else {
    const request = { prompt: positionals[1], task: values.task ?? null, maxNewTokens };
    await answer(model, request, (text) => process.stdout.write(text));
    console.log();
  }
  await model.close();
} catch (error) {
  if (!(error instanceof AdaLinkError)) throw error;
  console.error(`${error.code}: ${error.message}`);
  process.exitCode = 2;
}
