// Puts the page, the libraries that it needs and a model into one folder of static files.
//   node build.mjs EXPORTED [DIST]
import { access, cp, mkdir, readFile, rm } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const PAGE = ["index.html", "sessa.js"];
const LIBRARIES = [
  "@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
];

function refuse(message) {
  console.error(`error: ${message}`);
  process.exit(2);
}

async function exists(path) {
  return access(path).then(() => true, () => false);
}

const [exported, target = join(here, "dist")] = process.argv.slice(2);
if (!exported) refuse("name the folder that `sessa export --for web` wrote: npm run build -- FOLDER");
if (!(await exists(join(exported, "web.json"))))
  refuse(`${exported}: no web.json in it; export the checkpoint with --for web`);
for (const library of LIBRARIES)
  if (!(await exists(join(here, "node_modules", library))))
    refuse(`${library} is not installed; run npm install in ${here}`);
const dist = resolve(target);
if ((await exists(dist)) && !(await exists(join(dist, "sessa.js"))))
  refuse(`${dist}: is there and is no page of ours; name another folder`);

const { model } = JSON.parse(await readFile(join(exported, "web.json"), "utf8"));
await rm(dist, { recursive: true, force: true });
await mkdir(join(dist, "lib"), { recursive: true });
for (const file of PAGE) await cp(join(here, file), join(dist, file));
for (const library of LIBRARIES)
  await cp(join(here, "node_modules", library), join(dist, "lib", library.split("/").at(-1)));
for (const file of ["web.json", "tokenizer.json", "tokenizer_config.json", model])
  await cp(join(exported, file), join(dist, "model", file));
console.log(`${dist}: serve it with any web server, for example python -m http.server -d ${dist}`);
