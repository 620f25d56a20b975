import { Markdown } from "./markdown.js";
import { Totals, callOf, costs, ending, number, reason } from "./tokens.js";

const [scroller, greeting, log, form, field, send, stop, fresh, status, sum, dialog, usage] = [
  "scroller", "greeting", "log", "form", "question", "send", "stop", "fresh", "status", "sum", "usage", "usage-content",
].map((id) => document.getElementById(id));

let previous = null; // the id of the last finished answer: the next question continues it
let answering = null; // the AbortController of the answer that is being written
let totals = new Totals();

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = field.value.trim();
  if (answering || !text) return;
  field.value = "";
  ask(text);
});
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !dialog.open) answering?.abort();
});
stop.addEventListener("click", () => answering?.abort());
for (const suggestion of greeting.querySelectorAll("button")) {
  suggestion.addEventListener("click", () => ask(suggestion.textContent));
}
fresh.addEventListener("click", () => {
  answering?.abort();
  startOver();
  status.textContent = "New conversation";
  home().focus();
});
document.getElementById("show-usage").addEventListener("click", showUsage);

// The end stays in sight while the text or the question grows, unless the reader has scrolled up to read.
let following = true;
let at = 0;
function follow(wanted) {
  following = wanted;
  if (following) scroller.scrollTop = scroller.scrollHeight;
  at = scroller.scrollTop;
}
scroller.addEventListener("scroll", () => {
  const rest = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  // Text may have come since a scroll of our own, so only a scroll upwards is a reader's.
  following = rest < 48 || (following && scroller.scrollTop >= at);
  at = scroller.scrollTop;
});
const growth = new ResizeObserver(() => follow(following));
growth.observe(scroller);
growth.observe(log);

function startOver() {
  previous = null;
  totals = new Totals();
  log.replaceChildren();
  render();
}

async function ask(text) {
  const mine = (answering = new AbortController());
  const id = newId();
  const question = entry("question", "You asked", make("p", "text", text));
  const answer = new Answer(id, totals, () => {
    question.remove();
    ask(text);
  });
  render();
  follow(true);
  home().focus();
  status.textContent = "Answering";
  try {
    const response = await fetch("answers", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ text, id, previous_response_id: previous }),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(response.statusText);
    for await (const { event, data } of events(response.body)) {
      mine.signal.throwIfAborted();
      if (event === "text") answer.write(data);
      if (event === "trouble") answer.fail(data.message, data.code);
      if (event === "end") {
        previous = data.id;
        answer.finish(data);
      }
    }
    if (!answer.settled) answer.fail("The answer broke off.");
  } catch {
    if (answer.settled) return;
    if (mine.signal.aborted) answer.stop();
    else answer.fail("The connection to the service failed.");
  } finally {
    if (answering === mine) {
      answering = null;
      render();
    }
  }
}

/** What the service sends, event by event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", piece; !(piece = await reader.read()).done;) {
    const frames = (rest + piece.value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const { event, data } = Object.fromEntries(frame.split("\n").map((line) => line.split(/: (.*)/s)));
      if (data) yield { event, data: JSON.parse(data) };
    }
  }
}

/** An answer in the log, from its first word until its tokens are known. */
class Answer {
  constructor(id, totals, again) {
    this.id = id;
    this.totals = totals;
    this.again = again;
    this.settled = false;
    this.text = make("div", "text");
    this.item = entry("answer", "Answer", this.text);
    this.item.setAttribute("aria-busy", "true");
    this.markdown = new Markdown(this.text);
    this.dots = make("span", "waiting");
    this.dots.setAttribute("aria-hidden", "true");
    this.dots.append(make("i"), make("i"), make("i"));
    this.item.append(this.dots);
  }

  write(piece) {
    this.dots.remove();
    this.markdown.write(piece);
  }

  finish({ status: how, incomplete_details: details, usage }) {
    const why = {
      max_output_tokens: "Cut short by the token limit. ",
      content_filter: "Cut short by the content filter. ",
    }[details?.reason] ?? "Cut short. ";
    const facts = make("p", "facts");
    if (how === "incomplete") facts.append(why);
    if (usage) {
      const call = { ...usage, reasoning_tokens: usage.output_tokens_details?.reasoning_tokens, usage_source: "stream" };
      facts.append(...costs(call));
      this.totals.add(call);
    }
    this.#settle(facts);
    if (!usage) this.#count(facts);
  }

  stop() {
    this.item.classList.add("stopped");
    const facts = make("p", "facts");
    facts.append(make("b", "", "Stopped."), " ");
    const counting = make("span", "counting", "Looking up its tokens …");
    facts.append(counting, " Your next question continues without it.");
    this.#settle(facts);
    this.#count(counting, { isStopped: true });
  }

  fail(message, code) {
    const box = make("div", "trouble");
    const lost = ["previous_response_not_found", "context_length_exceeded"].includes(code);
    const again = make("button", "", lost ? "Ask in a new conversation" : "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      if (answering) return;
      if (lost) startOver();
      this.item.remove();
      this.again();
    });
    box.append(make("p", "", message), again);
    this.#settle(box);
    const facts = make("p", "facts");
    this.item.append(facts);
    this.#count(facts);
  }

  #settle(note) {
    this.settled = true;
    this.markdown.finish();
    this.item.removeAttribute("aria-busy");
    this.dots.remove();
    this.item.append(note);
    render();
    announce(this.item, `${this.text.innerText} ${(note.querySelector("p") ?? note).textContent}`);
  }

  /** Shows the tokens when the service knows them. */
  async #count(place, { isStopped = false } = {}) {
    this.totals.pending += 1;
    render();
    const call = await callOf(this.id);
    this.totals.pending -= 1;
    // Without a call only a stopped answer has something to tell: it may have begun all the same.
    if (call || isStopped) {
      this.totals.add(call);
      place.replaceChildren(...costs(call), isStopped ? "." : "");
      place.classList.remove("counting");
      if (!answering) announce(this.item, this.item.querySelector(".facts").textContent);
    }
    render();
  }
}

/** Tells a screen reader, unless the conversation has been cleared away. */
function announce(item, text) {
  if (item.isConnected) status.textContent = text;
}

async function showUsage() {
  usage.replaceChildren(make("p", "facts", "One moment …"));
  dialog.showModal();
  try {
    const response = await fetch("usage");
    if (!response.ok) throw new Error(response.statusText);
    usage.replaceChildren(...usageOf(await response.json()));
  } catch {
    usage.replaceChildren(make("p", "facts", "The service cannot be reached."));
  }
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside it
});

function usageOf({ user, calls, input_tokens, output_tokens, open, missing_reasons, latest }) {
  const figures = make("dl", "figures");
  for (const [name, count] of [["tokens in", input_tokens], ["tokens out", output_tokens], ["answers", calls]]) {
    const figure = make("div");
    figure.append(make("dt", "", name), make("dd", "", number(count)));
    figures.append(figure);
  }
  const notes = make("ul", "notes");
  if (open) notes.append(make("li", "", `${number(open)} not finished yet`));
  for (const [missing, count] of Object.entries(missing_reasons)) {
    notes.append(make("li", "", `${number(count)} without tokens: ${reason(missing)}`));
  }
  const table = make("table");
  const head = make("tr");
  head.append(...["Begun", "Ended", "In", "Out"].map((title) => make("th", "", title)));
  table.append(head);
  for (const call of latest) {
    const row = make("tr");
    const time = new Date(call.started_at * 1000).toLocaleTimeString("en", { hour12: false, timeStyle: "short" });
    row.append(make("td", "", time), make("td", "", ending(call.outcome)));
    row.append(make("td", "", number(call.input_tokens)), make("td", "", number(call.output_tokens)));
    table.append(row);
  }
  const who = make("p", "facts", `All answers of ${user}.`);
  return latest.length ? [who, figures, notes, table] : [who, figures];
}

function entry(kind, heading, text) {
  const item = make("li", kind);
  item.append(make("h2", "unseen", heading), text);
  log.append(item);
  return item;
}

function render() {
  greeting.hidden = log.childElementCount > 0;
  log.hidden = fresh.hidden = !greeting.hidden;
  // A focused button that hides would take the focus with it.
  if (!answering && document.activeElement === stop) home().focus();
  send.hidden = Boolean(answering);
  stop.hidden = !answering;
  sum.textContent = totals.text;
  sum.hidden = !totals.text;
}

/** Where the focus belongs when nothing else has it: on a phone not where the keyboard would cover the answer. */
function home() {
  return matchMedia("(pointer: fine)").matches ? field : scroller;
}

/** A random id. `crypto.randomUUID` is missing on pages without TLS. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}
