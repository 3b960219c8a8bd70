// Uses the page in Chromium as a person would and tells what it shows:
// page.mjs CHROMIUM URL '{"device", "prompt", "tokens", "temperature", "screenshot", "elsewhere"}'
import { chromium } from "playwright-core";

const [executablePath, url, given] = process.argv.slice(2);
const { device, prompt, tokens, temperature = 0, screenshot, elsewhere } = JSON.parse(given);
const args = [
  "--no-sandbox",
  "--disable-dev-shm-usage",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  // A software adapter, on machines without a graphics processor.
  ...(device === "webgpu" ? ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"] : []),
];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 960, height: 680 }, deviceScaleFactor: 1.5 });
const errors = [];
page.on("pageerror", (error) => errors.push(error.message));
const text = (id) => page.locator(`#${id}`).textContent();
const settled = (...states) =>
  page.waitForSelector(states.map((state) => `body[data-state="${state}"]`).join(), { timeout: 90000 });

await page.goto(`${url}?device=${device}`);
await settled("ready", "failed");
const adapter = await page.locator("#webgpu").isEnabled();
const loaded = { adapter, about: await text("about"), status: await text("status") };
if (loaded.about && (device === "wasm" || adapter)) {
  await page.locator("#text").pressSequentially(prompt);
  await page.locator("#temperature").fill(String(temperature));
  await page.locator("#length").fill(String(tokens));
  await page.click("#write");
  await settled("ready", "failed");
  loaded.text = await text("text");
  loaded.marked = await page.locator("#text > mark").textContent();
  loaded.status = await text("status");
  loaded.device = await page.locator("#device").inputValue();
  for (const id of ["speed", "wait", "used", "room"]) loaded[id] = Number(await text(id));
  if (screenshot) await page.screenshot({ path: screenshot });
  await page.click("#clear");
  loaded.cleared = await text("text");
}
if (elsewhere)
  // What a script that found its way into the page could do: fetch, load code, run inline code.
  loaded.allowed = await page.evaluate(async (address) => {
    const loads = (script) =>
      new Promise((done) => {
        script.onload = () => done(true);
        script.onerror = () => done(false);
        document.head.append(script);
      });
    const remote = Object.assign(document.createElement("script"), { src: `${address}sessa.js` });
    const inline = document.createElement("script");
    inline.textContent = "window.inlineRan = true";
    document.head.append(inline);
    return {
      fetch: await fetch(address, { mode: "no-cors" }).then(() => true, () => false),
      remote: await loads(remote),
      inline: Boolean(window.inlineRan),
    };
  }, elsewhere);
console.log(JSON.stringify({ ...loaded, errors }));
await browser.close();
