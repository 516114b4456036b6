// The caller's data sets, and the upload of rows.

import { ApiError, address, get, headers, part } from "./api.js";
import { byId, h, put, say, table } from "./dom.js";
import { ago, bytes, count } from "./format.js";
import { BASE, problem, toast } from "./shell.js";

const path = (name) => `${BASE}/data/${part(name)}`;

async function load() {
  try {
    const found = await get("datasets");
    say(byId("quota"), `${bytes(found.used_bytes)} of ${bytes(found.quota_bytes)} used`);
    put(byId("content"), found.data.length ? table("Data sets", ["Name", "Rows", "Size", "Version", "Versions", "Uploaded"], found.data.map((each) => [
      h("a", { href: path(each.name), class: "name" }, each.name), count(each.rows), bytes(each.bytes), h("code", {}, each.sha256.slice(0, 12)), each.versions, ago(each.created_at)]), { classes: "card" })
      : h("p", { class: "empty" }, "No data sets yet. Upload rows above, or with ", h("code", {}, "moe-train data push"), "."));
  } catch (error) { problem(error); }
}

byId("file").addEventListener("change", () => {
  const file = byId("file").files[0];
  if (file && !byId("name").value) byId("name").value = file.name.replace(/\.(gz|jsonl|ndjson|csv)/g, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
});

// XMLHttpRequest, because fetch does not tell how much of a body is sent.
function send(name, file, tell) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", address(`datasets/${part(name)}`));
    for (const [header, value] of Object.entries(headers())) request.setRequestHeader(header, value);
    request.setRequestHeader("Content-Type", /\.csv(\.gz)?$/i.test(file.name) ? "text/csv" : "application/jsonl");
    if (/\.gz$/i.test(file.name)) request.setRequestHeader("Content-Encoding", "gzip");
    request.upload.addEventListener("progress", (event) => tell(event.loaded, event.total));
    request.addEventListener("error", () => failed(new ApiError(0, "the server ended the connection")));
    request.addEventListener("load", () => {
      let content = {};
      try { content = JSON.parse(request.responseText); } catch { /* said below */ }
      if (request.status < 300) done(content);
      else failed(new ApiError(request.status, content?.error?.message ?? `the server answered ${request.status}`));
    });
    request.send(file);
  });
}

byId("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = byId("file").files[0];
  const name = byId("name").value;
  const bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
  const words = h("p", { class: "muted", role: "status" });
  put(byId("sending"), bar, words);
  byId("sending").hidden = false;
  problem(null);
  try {
    await get("quota"); // asks for a token before megabytes are sent
    const made = await send(name, file, (loaded, total) => {
      bar.max = total;
      bar.value = loaded;
      say(words, loaded < total ? `${bytes(loaded)} of ${bytes(total)} sent` : "The server checks the rows …");
    });
    toast(made.is_new ? `${made.name}: ${count(made.rows)} rows stored.` : `${made.name}: these rows were stored before.`);
    byId("upload").reset();
    await load();
  } catch (error) { problem(error); }
  byId("sending").hidden = true;
});

load();
