/** Requests to this server, by relative paths, with the key of this tab. */

const KEY = "camserve-key";

/** A refusal of the server, with its own text. */
export class Problem extends Error {
  /**
   * @param {number} status 0 where the server was not reached
   * @param {string} code  the stable code of the problem body, or ""
   * @param {string} detail a sentence
   */
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
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
    throw new Problem(0, "", "The server cannot be reached. Is it still running?");
  }
  throw await problemOf(response);
}

async function problemOf(response) {
  try {
    const { code, detail } = await response.json();
    return new Problem(response.status, code, detail);
  } catch {
    return new Problem(response.status, "", `The server returned ${response.status}.`);
  }
}

/** ["a", 1], ["b", 2] as a query. */
export const query = (pairs) => new URLSearchParams(pairs.map(([name, value]) => [name, String(value)])).toString();
