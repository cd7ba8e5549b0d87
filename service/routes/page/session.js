/** The images of this tab in IndexedDB: they are there again after a reload, until they are removed. */

const STORE = "images";
const SESSION = "camserve-session";
const KEPT_MS = 86_400_000; // a closed tab's images are deleted by the first page that opens a day later

let opening = null;
let latest = 0; // microseconds of the last id: the clock may be coarser

/** The id of this tab; null where the browser forbids storage. */
function session() {
  try {
    const id = sessionStorage.getItem(SESSION) ?? newId();
    sessionStorage.setItem(SESSION, id);
    return id;
  } catch {
    return null;
  }
}

/** An id that no other tab has; later ids sort behind earlier ones. */
export const newId = () => {
  const [low] = crypto.getRandomValues(new Uint32Array(1));
  latest = Math.max(latest + 1, Math.round(1000 * (performance.timeOrigin + performance.now())));
  return `${latest.toString(36).padStart(11, "0")}-${low.toString(36)}`;
};

/** Keeps images; false if the browser does not store them. */
export function keep(images) {
  const at = Date.now();
  return change((store) => images.forEach(({ id, name, file }) => store.put({ session: session(), id, name, file, at })));
}

/** Deletes images. */
export function forget(images) {
  return change((store) => images.forEach(({ id }) => store.delete([session(), id])));
}

/** The images of this tab: `{id, name, file}`, in the order in which they were added. */
export async function kept() {
  const own = [];
  await change((store) => {
    store.openCursor().onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor) return;
      if (cursor.value.session === session()) own.push(cursor.value);
      else if (cursor.value.at < Date.now() - KEPT_MS) cursor.delete();
      cursor.continue();
    };
  });
  return own;
}

/** One transaction; whether it was stored. A page without storage works, so nothing is thrown. */
async function change(work) {
  try {
    if (session() === null) return false;
    opening ??= opened();
    const transaction = (await opening).transaction(STORE, "readwrite");
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(true);
      transaction.onabort = () => reject(transaction.error);
    });
    work(transaction.objectStore(STORE));
    return await done;
  } catch {
    return false;
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("camserve", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: ["session", "id"] });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(request.error);
  });
}
