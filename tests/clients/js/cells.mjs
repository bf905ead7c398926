// One client's process: runs the features it is told to, and writes what came of each. The same as
// ../cells.py, which says how; used by features.mjs.
import fs from 'node:fs'
import { randomUUID } from 'node:crypto'

export const ISOLATED = process.env.MICA_CLIENTS_ISOLATED === '1'
export const TEMPLATE = process.env.MICA_CLIENTS_TEMPLATE
export const PACKAGE = process.env.MICA_CLIENTS_PACKAGE
export const PATIENCE_MS = Number(process.env.MICA_CLIENTS_PATIENCE_S) * 1000
export const LARGE_BYTES = 100 * 1000 * 1000

class Absent extends Error {}

export function absent(reason) {
  throw new Absent(reason)
}

// Ends the cell with a reason where the client has no such call.
export function require(owner, name, what = name) {
  if (owner[name] === undefined) absent(`the client has no ${what}`)
}

// Polls until `condition` gives something true, and gives it; fails with `what` at the deadline.
export async function waitUntil(what, condition, deadlineMs = PATIENCE_MS) {
  const end = Date.now() + deadlineMs
  for (;;) {
    const value = await condition()
    if (value) return value
    if (Date.now() > end) throw new Error(`not in time: ${what}`)
    await new Promise((done) => setTimeout(done, 200))
  }
}

// What the promise must end with: an error of this kind.
export async function rejects(kind, promise) {
  let value
  try {
    value = await promise
  } catch (error) {
    if (error instanceof kind) return error
    throw error
  }
  throw new Error(`gave ${JSON.stringify(value)}, and was to fail with ${kind.name}`)
}

export const unique = (prefix) => `${prefix}-${randomUUID().slice(0, 13)}`

function write(cell) {
  fs.appendFileSync(process.env.MICA_CELLS, JSON.stringify(cell) + '\n')
}

// Runs the features named on the command line, in that order.
export async function main(features) {
  for (const name of process.argv[2].split(',')) {
    write({ feature: name, status: 'begun' })
    const begun = Date.now()
    let cell = { status: 'pass' }
    try {
      if (!features[name]) throw new Error(`the matrix has no test of ${name} for this client`)
      await features[name]()
    } catch (error) {
      if (error instanceof Absent) cell = { status: 'absent', reason: error.message }
      else cell = { status: 'fail', reason: `${error.name}: ${error.message}`.slice(0, 500), detail: error.stack }
    }
    write({ feature: name, seconds: (Date.now() - begun) / 1000, ...cell })
  }
}
