/** Requests to this server, by relative paths, with the key of this tab. */

const KEY = "camserve-key";

/** A refusal of the server, with its text; `sentenceOf` of problems.js says it to a visitor. */
export class Problem extends Error {
  /**
   * @param {number} status 0 where the server was not reached
   * @param {string} code  the stable code of the problem body, or ""
   * @param {string} detail a sentence, or ""
   * @param {{retryAfter?: number, request?: string}} more  seconds until another try, and the request's id
   */
  constructor(status, code, detail, { retryAfter = 0, request = "" } = {}) {
    super(detail);
    Object.assign(this, { status, code, retryAfter, request });
  }
}

export const hasKey = () => Boolean(storedKey());

export function useKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    keyOfThisPage = key;
  }
}

let keyOfThisPage = "";

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyOfThisPage;
  } catch {
    return keyOfThisPage;
  }
}

/** GET, or POST a Blob or FormData to, a relative path; the answer's JSON. Throws Problem, or AbortError. */
export async function request(path, { body, signal } = {}) {
  const headers = { accept: "application/json", ...authorization() };
  if (body instanceof Blob) headers["content-type"] = body.type || "application/octet-stream";
  return sent((response) => response.json(), path, { method: body ? "POST" : "GET", headers, body, signal });
}

/** GET a file by its relative path. Throws Problem, or AbortError. */
export const download = (path, signal) => sent((response) => response.blob(), path, { headers: authorization(), signal });

function authorization() {
  const key = storedKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function sent(read, path, options) {
  let response;
  try {
    response = await fetch(path, options);
    if (response.ok) return await read(response);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw await unsent(options?.body);
  }
  throw await problemOf(response);
}

/** Why nothing came back: the file cannot be read any more, or the server cannot be reached. */
async function unsent(body) {
  const files = body instanceof FormData ? [...body.values()] : [body];
  try {
    await Promise.all(files.filter((file) => file instanceof Blob).map((file) => file.slice(0, 1).arrayBuffer()));
  } catch {
    return new Problem(0, "unreadable_file", "The file cannot be read any more: it was changed, moved or deleted. Choose it again.");
  }
  return new Problem(0, "", "The server cannot be reached. Is it still running?");
}

async function problemOf(response) {
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  try {
    const { code, detail, request_id: request } = await response.json();
    return new Problem(response.status, code, detail, { retryAfter, request });
  } catch {
    return new Problem(response.status, "", "", { retryAfter });
  }
}

/** ["a", 1], ["b", 2] as a query. */
export const query = (pairs) => new URLSearchParams(pairs.map(([name, value]) => [name, String(value)])).toString();
