// Node's fetch against the service. Takes its address and an image file; prints one JSON object:
// for each call its status and what it answered.
import { readFile } from 'node:fs/promises'

const [url, path] = process.argv.slice(2)
const data = await readFile(path)
const png = { 'content-type': 'image/png' }

function form(count) {
  const form = new FormData()
  for (let index = 0; index < count; index += 1) {
    form.append('image', new Blob([data], { type: 'image/png' }), `Grün "${index}".png`)
  }
  return form
}

function stream() {
  let sent = 0
  return new ReadableStream({
    pull(controller) {
      if (sent >= data.length) {
        controller.close()
        return
      }
      controller.enqueue(new Uint8Array(data.subarray(sent, sent + 1000)))
      sent += 1000
    }
  })
}

async function call(target, options = {}) {
  const response = await fetch(url + target, { signal: AbortSignal.timeout(30000), ...options })
  return { status: response.status, body: await response.json() }
}

const post = (body, more = {}) => call('/predict', { method: 'POST', body, ...more })
const json = JSON.stringify({ images: [{ data: data.toString('base64') }] })

const answers = {
  form: await post(form(1)),
  'form of two': await post(form(2)),
  blob: await post(new Blob([data], { type: 'image/png' })),
  buffer: await post(data, { headers: png }),
  stream: await post(stream(), { headers: png, duplex: 'half' }),
  'stream, second': await post(stream(), { headers: png, duplex: 'half' }),
  json: await post(json, { headers: { 'content-type': 'application/json' } }),
  models: await call('/models'),
  'no type': await post(data),
  'text type': await post(json),
  'wrong option': await call('/predict?topk=1', {
    method: 'POST', body: stream(), headers: png, duplex: 'half'
  })
}
answers['at once'] = await Promise.all(Array.from({ length: 8 }, () => post(form(1))))
console.log(JSON.stringify(answers))
