// pipeline("text-generation") of transformers.js on an exported folder: FOLDER TEXTS COUNT
import { basename, dirname } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, texts, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const generator = await pipeline("text-generation", basename(folder));
const { model, tokenizer } = generator;
const options = { max_new_tokens: Number(count), do_sample: false };
const found = [];
for (const text of JSON.parse(texts)) {
  const inputs = tokenizer(text, { add_special_tokens: false });
  const output = await model.generate({ ...inputs, ...options });
  const tokens = output.tolist()[0].map(Number).slice(inputs.input_ids.dims[1]);
  const [{ generated_text }] = await generator(text, { ...options, return_full_text: false });
  found.push({ tokens, same: generated_text === tokenizer.decode(tokens, { skip_special_tokens: true }) });
}
console.log(JSON.stringify(found));
process.exit(0);
