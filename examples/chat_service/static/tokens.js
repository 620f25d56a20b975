// The tokens of answers: asked for, added up, and put into words.

// By `openai_responses.usage.missing_reason`.
const REASONS = {
  no_response_id: "the answer had not begun",
  not_stored: "the model's server does not store answers",
  not_found: "the model's server no longer has this answer",
  unauthorized: "the model's server did not allow the look-up",
  unsupported: "the model's server has no look-up",
  no_usage: "the model's server did not count them",
  timeout: "the model's server took too long",
  transport_error: "the model's server could not be reached",
  circuit_open: "look-ups at the model's server have failed before",
  overload: "too many look-ups were waiting",
  disabled: "look-ups are switched off",
  shutdown: "the service was stopped",
};
// By `openai_responses.stream.outcome`. The service adds `killed`.
const ENDINGS = {
  completed: "finished",
  incomplete: "cut short",
  cancelled: "stopped",
  closed: "stopped",
  exit: "service stopped",
  killed: "service killed",
  cut: "connection lost",
  truncated: "broke off",
};
const PATIENCE_MS = 60_000;
const UNTIL_BEGUN_MS = 3_000;

/**
 * Asks the service for the call of a question until its tokens are known or known to be unknown.
 *
 * Short requests, further and further apart: they also survive a restart of the service, and a closed tab ends them.
 * Returns null if the service knows of no such call, and undefined if there is no result in time.
 */
export async function callOf(question) {
  const begun = performance.now();
  for (let pause = 150, seen = false; ; pause = Math.min(pause * 1.4, 2_000)) {
    await new Promise((resolve) => setTimeout(resolve, pause));
    const waited = performance.now() - begun;
    try {
      const response = await fetch(`usage/${question}`);
      if (response.ok) {
        const call = await response.json();
        if (call.outcome) return call;
        seen = true;
      } else if (!seen && waited > UNTIL_BEGUN_MS) {
        return null;
      }
    } catch {
      // The service is away. It may come back.
    }
    if (waited > PATIENCE_MS) return undefined;
  }
}

/** The sums of a conversation. */
export class Totals {
  input = 0;
  output = 0;
  pending = 0;
  unknown = 0;

  add(call) {
    if (call?.usage_source) {
      this.input += call.input_tokens ?? 0;
      this.output += call.output_tokens ?? 0;
    } else {
      this.unknown += 1;
    }
  }

  get text() {
    if (!this.input && !this.output && !this.unknown) return "";
    const parts = [`This conversation: ${number(this.input)} tokens in, ${number(this.output)} out`];
    if (this.pending) parts.push(`${number(this.pending)} being looked up`);
    if (this.unknown) parts.push(`${number(this.unknown)} ${this.unknown === 1 ? "answer" : "answers"} unknown`);
    // A line may break between the parts only.
    return parts.map((part) => part.replaceAll(" ", "\u00a0").replace(":\u00a0", ": ")).join("\u00a0· ");
  }
}

/** What a call has cost, as nodes: numbers stand out. */
export function costs(call) {
  if (call === undefined) return ["Its tokens are not known yet: “Usage” shows them later"];
  if (!call?.usage_source) return [`Its tokens are unknown: ${reason(call?.missing_reason ?? "no_response_id")}`];
  const words = [bold(call.input_tokens), " tokens in, ", bold(call.output_tokens), " out"];
  if (call.reasoning_tokens) words.push(`, ${number(call.reasoning_tokens)} of them reasoning`);
  if (call.usage_source === "retrieval") words.push(`, looked up${seconds(call.look_up_seconds)}`);
  return words;
}

export function reason(missing) {
  return REASONS[missing] ?? missing;
}

export function ending(outcome) {
  return outcome === null ? "not yet" : (ENDINGS[outcome] ?? outcome);
}

export function number(count) {
  return count === null ? "?" : count.toLocaleString("en");
}

function seconds(time) {
  if (time === null) return " after a restart";
  return time < 0.05 ? " in under 0.1 s" : ` in ${time.toFixed(1)} s`;
}

function bold(count) {
  const element = document.createElement("b");
  element.textContent = number(count);
  return element;
}
