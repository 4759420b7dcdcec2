// Server-sent events from a byte stream. A chunk of the network may end anywhere: in the middle of a
// character, of a line, of an event. Bytes are decoded as a stream, text is kept until its event is
// complete. Yields the JSON of each event; returns true if the stream said that it was over.

export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let kept = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      kept += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      let start = 0;
      for (let end; (end = kept.indexOf("\n", start)) >= 0; start = end + 1) {
        const line = kept.slice(start, kept[end - 1] === "\r" ? Math.max(start, end - 1) : end);
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return true;
          yield JSON.parse(text);
        }
      }
      kept = kept.slice(start);
      if (done) return false;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
