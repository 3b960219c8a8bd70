// Greedy tokens by the page's own class, in node: generate.mjs FOLDER cpu|wasm IDS COUNT
// "cpu" is onnxruntime-node, "wasm" the onnxruntime-web that the page ships.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { SessaModel } from "../../export/web/sessa.js";

const [folder, provider, prompts, count] = process.argv.slice(2);
const packages = provider === "cpu" ? import.meta.url : new URL("../../export/web/sessa.js", import.meta.url);
const name = provider === "cpu" ? "onnxruntime-node" : "onnxruntime-web";
const { default: ort } = await import(createRequire(packages).resolve(name));
if (provider === "wasm") ort.env.wasm.numThreads = 1;
const read = (file) => readFile(join(folder, file));
const model = await SessaModel.load({ ort, Tokenizer, read, provider });
const found = [];
for (const ids of JSON.parse(prompts)) {
  found.push([]);
  const options = { maxTokens: Number(count), temperature: 0 };
  for await (const token of model.tokens(ids, options)) found.at(-1).push(token);
}
const text = "Grüße, 東京! 👍";
let written = "";
for await (const piece of model.write(text, { maxTokens: 5, temperature: 0 })) written += piece.text;
const again = [];
for await (const id of model.tokens(model.encode(text), { maxTokens: 5, temperature: 0 })) again.push(id);
const streamed = written === model.tokenizer.decode(again, { skip_special_tokens: true });
console.log(JSON.stringify({ found, ids: model.encode(text), streamed, runtime: ort.env.versions }));
process.exit(0);
