// The page of `serve`: each question goes to both models, and their answers are shown as they are written.
"use strict";

const element = (id) => document.getElementById(id);
const sides = ["tuned", "base"].map((model) => ({ model, column: element(model), messages: [] }));
let stopping = null;

function add(parent, className, text) {
  const node = document.createElement("div");
  node.className = className;
  node.textContent = text;
  parent.append(node);
  return node;
}

// The objects that a stream of server-sent events holds.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(side, settings, signal) {
  const box = add(side.column, "answer waiting", "");
  const facts = add(side.column, "facts-of", "");
  const began = performance.now();
  let text = "", ended = "stopped", tokens = 0;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...settings, model: side.model, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text += choice?.delta.content ?? "";
      ended = choice?.finish_reason ?? ended;
      tokens = event.usage?.completion_tokens ?? tokens;
      box.textContent = text;
      box.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      box.classList.add("failed");
      box.textContent = text || error.message;
      ended = error.message;
    }
  }
  box.classList.remove("waiting");
  const how = { stop: "", length: ", cut at the limit" }[ended] ?? `, ${ended}`;
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  facts.textContent = tokens ? `${tokens} tokens, ${seconds} s${how}` : how.slice(2);
  if (text) side.messages.push({ role: "assistant", content: text });
  else side.messages.pop();
}

async function ask(question) {
  const system = element("system").value.trim();
  stopping = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  await Promise.all(sides.map((side) => {
    add(side.column, "question", question);
    side.messages.push({ role: "user", content: question });
    const settings = {
      messages: [...(system ? [{ role: "system", content: system }] : []), ...side.messages],
      temperature: Number(element("temperature").value),
      max_completion_tokens: Number(element("length").value),
    };
    return answer(side, settings, stopping.signal);
  }));
  element("send").disabled = false;
  element("stop").disabled = true;
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (!question || element("send").disabled) return;
  element("question").value = "";
  ask(question);
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
element("stop").addEventListener("click", () => stopping?.abort());
element("clear").addEventListener("click", () => {
  stopping?.abort();
  for (const side of sides) {
    side.messages = [];
    for (const node of side.column.querySelectorAll("div")) node.remove();
  }
});
