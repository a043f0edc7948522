// The chat page: one conversation, streamed from /v1/chat/completions with each token's probability.
// Text of the model is only ever put into the page as text.

const $ = (id) => document.getElementById(id);
const log = $("log"), question = $("question"), tooltip = $("tooltip"), scroll = $("scroll");

let model = "";
let messages = []; // {role, content}: what the model is asked with
let running = null; // AbortController of the answer being written

// ---- talking to the server

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const fault = new Error(body.error?.message ?? `The server answered ${response.status}.`);
  fault.status = response.status;
  throw fault;
}

// The parsed `data:` objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function hello() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    model = data[0].id;
    $("model").textContent = model;
    $("facts").textContent = `${data[0].max_model_len.toLocaleString("en")} tokens of context`;
    document.title = `${model} · ownlm`;
    $("max-tokens").max = data[0].max_model_len;
    complain("");
  } catch (fault) {
    complain(fault.status === 401 ? "This server needs an API key. Enter it in the settings." : fault.message);
    if (fault.status === 401) settings(true, "key");
  }
  ready();
}

// ---- an answer and its tokens

// How a probability is shaded: nothing from 0.7 on, four steps below.
const shade = (p) => (p >= 0.7 ? "" : p >= 0.4 ? "d1" : p >= 0.2 ? "d2" : p >= 0.07 ? "d3" : "d4");
const details = new WeakMap(); // token's element -> its entries of the API

class Answer {
  constructor() {
    this.item = element("li", "assistant writing");
    this.text = element("p", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("aria-label", "Answer. Arrow keys walk through its tokens.");
    this.below = element("div", "below");
    this.item.append(this.text, this.below);
    log.append(this.item);
    this.content = "";
    this.shown = 0; // characters of `content` that are in the page
    this.count = 0;
    this.bytes = new TextDecoder();
    this.waiting = []; // tokens that hold the first bytes of a character
  }

  add(content, tokens) {
    this.content += content;
    for (const token of tokens) {
      this.count += 1;
      this.waiting.push(token);
      let piece = this.bytes.decode(new Uint8Array(token.bytes ?? []), { stream: true });
      if (!piece) continue;
      // Some vocabularies write a space before the first word that the text doesn't have.
      if (!this.content.startsWith(piece, this.shown)) piece = piece.trimStart();
      if (this.content.startsWith(piece, this.shown)) this.put(piece, this.waiting);
      this.waiting = [];
    }
    if (!this.waiting.length && this.shown < this.content.length) this.put(this.content.slice(this.shown), []);
  }

  put(piece, tokens) {
    this.shown += piece.length;
    if (!tokens.length) return this.text.append(piece);
    const p = Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
    const span = element("span", `token ${shade(p)}`, piece);
    details.set(span, tokens);
    this.text.append(span);
  }

  end(note) {
    if (this.shown < this.content.length) this.put(this.content.slice(this.shown), []);
    this.item.classList.remove("writing");
    const again = element("button", "plain", "Regenerate");
    again.type = "button";
    again.addEventListener("click", () => regenerate());
    log.querySelectorAll(".below button").forEach((button) => button.remove()); // only the last answer can be asked for again
    this.below.replaceChildren(again, element("span", "quiet", note));
  }
}

async function answer() {
  complain("");
  const reply = new Answer();
  running = new AbortController();
  ready();
  follow(true);
  const system = $("system").value.trim();
  const limit = parseInt($("max-tokens").value, 10);
  const began = performance.now();
  let note = "";
  try {
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      body: JSON.stringify({
        model,
        messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
        temperature: Number($("temperature").value),
        ...(limit > 0 ? { max_tokens: limit } : {}),
        stream: true,
        logprobs: true,
        top_logprobs: 5,
      }),
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      const near = isNear();
      reply.add(choice.delta.content ?? "", choice.logprobs?.content ?? []);
      if (choice.finish_reason === "length") note = "cut at the limit · ";
      follow(near);
    }
  } catch (fault) {
    if (fault.name === "AbortError") note = "stopped · ";
    else {
      complain(fault.message);
      if (fault.status === 401) settings(true, "key");
    }
  }
  running = null;
  const seconds = (performance.now() - began) / 1000;
  if (reply.count) {
    messages.push({ role: "assistant", content: reply.content });
    const near = isNear();
    reply.end(`${note}${reply.count} tokens · ${(reply.count / seconds).toFixed(0)} per second`);
    follow(near);
  } else if (note) reply.end(note.replace(" · ", ""));
  else if ($("error").hidden) {
    messages.push({ role: "assistant", content: "" });
    reply.end("an empty answer");
  } else reply.item.remove();
  ready();
}

function send() {
  const content = question.value.trim();
  if (!content || running || !model) return;
  // A question that got no answer is replaced by the next one.
  if (messages.at(-1)?.role === "user") messages.pop();
  question.value = "";
  grow();
  $("welcome").hidden = true;
  messages.push({ role: "user", content });
  const item = element("li", "user");
  item.append(element("p", "text", content));
  log.append(item);
  answer();
}

function regenerate() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  log.lastElementChild?.remove();
  hide();
  answer();
}

function clear() {
  running?.abort();
  messages = [];
  log.replaceChildren();
  $("welcome").hidden = false;
  complain("");
  hide();
  question.focus();
}

// ---- the probability of a token

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};
const visible = (token) => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

function show(span) {
  document.querySelector(".token.current")?.classList.remove("current");
  span.classList.add("current");
  const tables = details.get(span).map((token) => {
    const table = element("table");
    const listed = token.top_logprobs.some((other) => other.token === token.token);
    for (const entry of listed ? token.top_logprobs : [token, ...token.top_logprobs]) {
      const row = table.insertRow();
      row.className = entry.token === token.token ? "chosen" : "";
      const name = row.insertCell(), bar = row.insertCell(), number = row.insertCell();
      name.className = "name";
      name.textContent = visible(entry.token);
      const meter = element("meter");
      meter.value = Math.exp(entry.logprob);
      bar.append(meter);
      number.className = "number";
      number.textContent = percent(entry.logprob);
    }
    return table;
  });
  tooltip.replaceChildren(...tables);
  tooltip.hidden = false;
  const place = span.getClientRects()[0], box = tooltip.getBoundingClientRect();
  const above = place.top - box.height - 8;
  tooltip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
  tooltip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.width - 8))}px`;
}

function hide() {
  tooltip.hidden = true;
  document.querySelector(".token.current")?.classList.remove("current");
}

// In a focused answer the arrow keys move from token to token.
function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hide();
  if (!step || !event.target.matches(".assistant .text")) return;
  const tokens = [...event.target.querySelectorAll(".token")];
  const next = tokens[tokens.indexOf(event.target.querySelector(".current")) + step] ?? (step > 0 ? tokens[0] : tokens.at(-1));
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView({ block: "nearest" });
  show(next);
}

// ---- the page around it

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function ready() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !model || !question.value.trim();
  log.setAttribute("aria-busy", String(Boolean(running)));
}

const isNear = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const follow = (wanted) => wanted && scroll.scrollTo(0, scroll.scrollHeight);

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
  ready();
}

function settings(open, focus) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (open && focus) $(focus).focus();
}

const showTemperature = () => ($("temperature-value").textContent = Number($("temperature").value).toFixed(2));

$("form").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("settings-button").addEventListener("click", () => settings($("settings").hidden));
$("temperature").addEventListener("input", showTemperature);
$("key").addEventListener("change", hello);
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
log.addEventListener("pointerover", (event) => details.has(event.target) && show(event.target));
log.addEventListener("pointerout", (event) => event.pointerType === "mouse" && hide());
log.addEventListener("click", (event) => details.has(event.target) && show(event.target));
log.addEventListener("focusout", hide);
scroll.addEventListener("scroll", () => !document.activeElement?.matches(".text") && hide());
document.addEventListener("keydown", walk);

showTemperature();
hello();
