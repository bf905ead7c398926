// What the npm clients `e2b` and `@e2b/code-interpreter` go through, by the same names as in
// ../python/features.py. Started by matrix.py beside the packages, with the features to run.
import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'

import {
  ISOLATED,
  LARGE_BYTES,
  main,
  PACKAGE,
  PATIENCE_MS,
  absent,
  rejects,
  require,
  TEMPLATE,
  unique,
  waitUntil,
} from './cells.mjs'

const { Sandbox, CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } = await import(PACKAGE)

const SLOW = { requestTimeoutMs: PATIENCE_MS }
const RUN = { ...SLOW, timeoutMs: PATIENCE_MS }
// The stand-in's agent knows only the user it runs as itself.
const [DEFAULT_USER, DEFAULT_HOME] = ISOLATED ? ['user', '/home/user'] : ['root', '/root']

const make = (template = TEMPLATE, options = {}) =>
  Sandbox.create(template, { timeoutMs: 900_000, ...SLOW, ...options })

// Runs `use` on a sandbox that is killed afterwards, whatever happened to it.
async function own(use, template, options) {
  const sandbox = await make(template, options)
  try {
    return await use(sandbox)
  } finally {
    await Sandbox.kill(sandbox.sandboxId, SLOW)
  }
}

let sharedSandbox
// One sandbox for all that does not harm it.
const shared = async () => (sharedSandbox ??= await make())

async function folder(sandbox) {
  const path = `/tmp/${unique('matrix')}`
  assert.equal(await sandbox.files.makeDir(path, SLOW), true)
  return path
}

const start = (sandbox, command, options = {}) =>
  sandbox.commands.run(command, { background: true, timeoutMs: 0, ...SLOW, ...options })

const run = async (sandbox, command, options = {}) =>
  (await sandbox.commands.run(command, { ...RUN, ...options })).stdout

const pids = async (sandbox) => (await sandbox.commands.list(SLOW)).map((process) => process.pid)

// Every entry of a list that comes in pages.
async function all(pages) {
  const found = []
  while (pages.hasNext) found.push(...(await pages.nextItems()))
  return found
}

const listed = (metadata) => all(Sandbox.list({ query: { metadata }, limit: 1, ...SLOW }))
const sha256 = (data) => createHash('sha256').update(data).digest('hex')
const plain = (text) => text.replace(/\x1b\[[0-9;]*m/g, '')

// What the user could not make, read or remove: done all the same, and what is made is the user's.
async function whereOnlyRootMay(sandbox) {
  const { files } = sandbox
  // The root of the stand-in's disk is that of this machine.
  const where = `${ISOLATED ? '' : '/tmp'}/${unique('matrix')}`
  await files.write(`${where}/deep/a.txt`, 'a', SLOW)
  assert.equal(await files.makeDir(`${where}/made/below`, SLOW), true)
  const made = ['', '/deep', '/deep/a.txt', '/made', '/made/below'].map((path) => where + path)
  const owners = (await run(sandbox, `stat -c %U:%G ${made.join(' ')}`)).trim().split('\n')
  assert.deepEqual(owners, made.map(() => `${DEFAULT_USER}:${DEFAULT_USER}`))
  const root = { user: 'root' }
  await run(sandbox, `chown -R root:root ${where}; chmod 700 ${where}; chmod 600 ${where}/deep/a.txt`, root)
  assert.equal(await files.read(`${where}/deep/a.txt`, SLOW), 'a')
  assert.deepEqual((await files.list(where, SLOW)).map((entry) => entry.name).sort(), ['deep', 'made'])
  assert.equal((await files.rename(`${where}/deep/a.txt`, `${where}/b.txt`, SLOW)).path, `${where}/b.txt`)
  assert.equal(await run(sandbox, `stat -c '%U %a' ${where}/b.txt`, root), 'root 600\n')
  await files.write(`${where}/b.txt`, 'b', SLOW)
  assert.equal(await run(sandbox, `stat -c '%U %a' ${where}/b.txt`, root), `${DEFAULT_USER} 600\n`)
  await files.remove(where, SLOW)
  assert.equal(await files.exists(where, SLOW), false)
}

// The copy has what was written before, and neither sees what the other writes after.
async function differsFromThenOn(source, copy, where) {
  assert.notEqual(copy.sandboxId, source.sandboxId)
  assert.equal(await copy.files.read(`${where}/before`, SLOW), 'before')
  assert.equal(await run(copy, 'echo $E2B_SANDBOX_ID'), `${copy.sandboxId}\n`)
  if (!ISOLATED) return
  assert.equal(await copy.files.exists(`${where}/after`, SLOW), false)
  await copy.files.write(`${where}/of-the-copy`, 'x', SLOW)
  assert.equal(await source.files.exists(`${where}/of-the-copy`, SLOW), false)
}

const features = {
  create: () =>
    own(async (sandbox) => {
      assert.match(sandbox.sandboxId, /^i[0-9a-z]{20}$/)
      assert.equal(await sandbox.isRunning(SLOW), true)
      const info = await Sandbox.getInfo(sandbox.sandboxId, SLOW)
      assert.equal(info.sandboxId, sandbox.sandboxId)
      assert.equal(info.state, 'running')
      const lengthS = (info.endAt - info.startedAt) / 1000
      assert.ok(lengthS > 890 && lengthS < 910, `${lengthS}`)
    }),

  async code() {
    require(Sandbox.prototype, 'runCode')
    const sandbox = await shared()
    let execution = await sandbox.runCode("print('printed'); 6*7", RUN)
    assert.equal(execution.error, undefined)
    assert.equal(execution.logs.stdout.join(''), 'printed\n')
    assert.equal(execution.text, '42')
    execution = await sandbox.runCode(
      'import matplotlib.pyplot as plt\n' +
        "plt.plot([1, 2, 3], [4, 5, 6]); plt.title('T'); plt.xlabel('X'); plt.ylabel('Y'); plt.show()",
      RUN,
    )
    assert.equal(execution.error, undefined)
    const [result, ...others] = execution.results.filter((result) => result.png)
    assert.equal(others.length, 0)
    const { type, title, x_label: x, y_label: y, elements } = result.chart
    assert.deepEqual([type, title, x, y], ['line', 'T', 'X', 'Y'])
    assert.deepEqual(elements[0].points.map((point) => point.map(Number)), [[1, 4], [2, 5], [3, 6]])
  },

  async traceback() {
    require(Sandbox.prototype, 'runCode')
    const { error } = await (await shared()).runCode('def inner():\n    return 1/0\ninner()', RUN)
    assert.deepEqual([error.name, error.value], ['ZeroDivisionError', 'division by zero'])
    assert.match(plain(error.traceback), /return 1\/0/)
    assert.match(plain(error.traceback), /in inner\(\)/)
  },

  async command() {
    const sandbox = await shared()
    let seen = ''
    const onStdout = (text) => (seen += text)
    const result = await sandbox.commands.run('echo out; echo err >&2', { onStdout, ...RUN })
    assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
    assert.equal(seen, 'out\n')
    const failure = await rejects(CommandExitError, run(sandbox, 'echo x; exit 3'))
    assert.deepEqual([failure.exitCode, failure.stdout], [3, 'x\n'])
  },

  async background() {
    const sandbox = await shared()
    const handle = await start(sandbox, 'sleep 1; echo done')
    assert.ok((await pids(sandbox)).includes(handle.pid))
    const again = await sandbox.commands.connect(handle.pid, RUN)
    assert.equal(again.pid, handle.pid)
    const result = await handle.wait()
    assert.deepEqual([result.stdout, result.exitCode], ['done\n', 0])
    await again.disconnect()
    await waitUntil('the process leaves the list', async () => !(await pids(sandbox)).includes(handle.pid))
  },

  async stdin() {
    const sandbox = await shared()
    let handle = await start(sandbox, 'read line; echo "got:$line"', { stdin: true })
    await sandbox.commands.sendStdin(handle.pid, 'a line\n', SLOW)
    assert.equal((await handle.wait()).stdout, 'got:a line\n')
    handle = await start(sandbox, 'cat; echo end', { stdin: true })
    await sandbox.commands.sendStdin(handle.pid, 'kept\n', SLOW)
    await sandbox.commands.closeStdin(handle.pid, SLOW)
    assert.equal((await handle.wait()).stdout, 'kept\nend\n')
  },

  async command_kill() {
    const sandbox = await shared()
    const handle = await start(sandbox, 'sleep 600')
    const end = rejects(CommandExitError, handle.wait())
    assert.equal(await sandbox.commands.kill(handle.pid, SLOW), true)
    assert.equal((await end).exitCode, -1)
    assert.match((await end).error, /signal: killed/)
    await waitUntil('the process leaves the list', async () => !(await pids(sandbox)).includes(handle.pid))
    assert.equal(await sandbox.commands.kill(handle.pid, SLOW), false)
  },

  async command_timeout() {
    const sandbox = await shared()
    const mark = unique('sleeper')
    await rejects(TimeoutError, run(sandbox, `exec -a ${mark} sleep 600`, { timeoutMs: 2000 }))
    await waitUntil('the process ends with its timeout', async () => {
      const processes = await sandbox.commands.list(SLOW)
      return !processes.some((process) => process.args.join(' ').includes(mark))
    })
  },

  async user() {
    const sandbox = await shared()
    assert.equal(await run(sandbox, 'id -un; echo $HOME'), `${DEFAULT_USER}\n${DEFAULT_HOME}\n`)
    assert.equal(await run(sandbox, 'id -un; echo $HOME', { user: 'root' }), 'root\n/root\n')
    const refused = await rejects(Error, run(sandbox, 'true', { user: 'nobody-of-that-name' }))
    assert.match(refused.message, /invalid username: 'nobody-of-that-name'/)
  },

  async cwd() {
    const sandbox = await shared()
    assert.equal(await run(sandbox, 'pwd', { cwd: '/usr' }), '/usr\n')
    const refused = await rejects(InvalidArgumentError, run(sandbox, 'true', { cwd: '/no/such' }))
    assert.match(refused.message, /\/no\/such.*does not exist/)
  },

  envs: () =>
    own(
      async (sandbox) => {
        const command = 'echo "$AT_CREATE|$BOTH|$AT_RUN|$E2B_SANDBOX|$E2B_SANDBOX_ID"'
        const said = await run(sandbox, command, { envs: { BOTH: 'run', AT_RUN: 'ü=1' } })
        assert.equal(said, `a b|run|ü=1|true|${sandbox.sandboxId}\n`)
      },
      TEMPLATE,
      { envs: { AT_CREATE: 'a b', BOTH: 'create' } },
    ),

  async pty() {
    const sandbox = await shared()
    const seen = []
    const onData = (data) => seen.push(Buffer.from(data))
    const terminal = await sandbox.pty.create({ rows: 24, cols: 80, timeoutMs: 0, onData, ...SLOW })
    const end = rejects(CommandExitError, terminal.wait())
    await sandbox.pty.resize(terminal.pid, { rows: 30, cols: 100 }, SLOW)
    await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('stty size; echo $TERM; exit 5\n'), SLOW)
    assert.equal((await end).exitCode, 5)
    assert.match(Buffer.concat(seen).toString(), /30 100/)
    assert.match(Buffer.concat(seen).toString(), /xterm/)
  },

  async text() {
    const sandbox = await shared()
    const { files } = sandbox
    const where = await folder(sandbox)
    assert.equal((await files.write(`${where}/deep/a.txt`, 'line\nünï €\n', SLOW)).path, `${where}/deep/a.txt`)
    assert.equal(await files.read(`${where}/deep/a.txt`, SLOW), 'line\nünï €\n')
    assert.equal((await files.write(`${where}/empty`, '', SLOW)).name, 'empty')
    assert.equal(await files.read(`${where}/empty`, SLOW), '')
    const entries = (await files.list(where, SLOW)).map((entry) => `${entry.name} ${entry.type}`)
    assert.deepEqual(entries.sort(), ['deep dir', 'empty file'])
    assert.equal((await files.getInfo(`${where}/deep/a.txt`, SLOW)).size, Buffer.byteLength('line\nünï €\n'))
    assert.equal((await files.rename(`${where}/deep/a.txt`, `${where}/b.txt`, SLOW)).path, `${where}/b.txt`)
    assert.equal(await files.exists(`${where}/deep/a.txt`, SLOW), false)
    assert.equal(await files.makeDir(where, SLOW), false)
    await files.remove(where, SLOW)
    assert.equal(await files.exists(where, SLOW), false)
    const missing = await rejects(NotFoundError, files.read(`${where}/b.txt`, SLOW))
    assert.match(missing.message, /does not exist/)
    await whereOnlyRootMay(sandbox)
  },

  async bytes() {
    const { files } = await shared()
    const where = await folder({ files })
    const data = Buffer.alloc(1 << 20, Buffer.from(Array.from({ length: 256 }, (_, byte) => byte)))
    await files.write(`${where}/blob`, new Uint8Array(data).buffer, SLOW)
    assert.ok(data.equals(await files.read(`${where}/blob`, { format: 'bytes', ...SLOW })))
    const blob = await files.read(`${where}/blob`, { format: 'blob', ...SLOW })
    assert.ok(data.equals(Buffer.from(await blob.arrayBuffer())))
    await files.write(`${where}/stream`, new Blob([data]).stream(), SLOW)
    assert.ok(data.equals(await files.read(`${where}/stream`, { format: 'bytes', ...SLOW })))
    await files.remove(where, SLOW)
  },

  async large() {
    const sandbox = await shared()
    const where = await folder(sandbox)
    const data = Buffer.alloc(LARGE_BYTES, randomBytes(1_000_000))
    await sandbox.files.write(`${where}/large`, new Uint8Array(data).buffer, SLOW)
    const [size, digest] = (await run(sandbox, `stat -c %s ${where}/large; sha256sum ${where}/large`)).split(/\s+/)
    assert.deepEqual([size, digest], [String(LARGE_BYTES), sha256(data)])
    const down = createHash('sha256')
    let count = 0
    for await (const chunk of await sandbox.files.read(`${where}/large`, { format: 'stream', ...SLOW })) {
      down.update(chunk)
      count += chunk.length
    }
    assert.deepEqual([count, down.digest('hex')], [LARGE_BYTES, digest])
    await sandbox.files.remove(where, SLOW)
  },

  async watch() {
    const { files } = await shared()
    const where = await folder({ files })
    const seen = new Set()
    const watcher = await files.watchDir(where, (event) => seen.add(`${event.name} ${event.type}`), SLOW)
    await files.write(`${where}/new`, 'x', SLOW)
    await waitUntil("the file's creation and its content are told", () =>
      ['new create', 'new write'].every((event) => seen.has(event)),
    )
    await watcher.stop()
    await files.remove(where, SLOW)
  },

  async list() {
    const metadata = { mark: unique('list'), 'odd key&': 'a b&c=d/ü%' }
    const use = (first) =>
      own(
        async (second) => {
          const entries = await listed(metadata)
          const ids = entries.map((entry) => entry.sandboxId).sort()
          assert.deepEqual(ids, [first.sandboxId, second.sandboxId].sort())
          for (const entry of entries) assert.deepEqual(entry.metadata, metadata)
          assert.deepEqual(await listed({ mark: unique('nobody') }), [])
        },
        TEMPLATE,
        { metadata },
      )
    await own(use, TEMPLATE, { metadata })
  },

  set_timeout: () =>
    own(async (sandbox) => {
      const leftS = async () => ((await Sandbox.getInfo(sandbox.sandboxId, SLOW)).endAt - Date.now()) / 1000
      await sandbox.setTimeout(3_000_000, SLOW)
      assert.ok(Math.abs((await leftS()) - 3000) < 100)
      await sandbox.setTimeout(120_000, SLOW)
      assert.ok((await leftS()) < 130)
      await sandbox.setTimeout(1000, SLOW)
      await waitUntil('its time is over', async () => !(await sandbox.isRunning(SLOW)))
    }),

  async pause() {
    const metadata = { mark: unique('pause') }
    const use = async (sandbox) => {
      assert.equal(await sandbox.pause(SLOW), true)
      assert.equal((await Sandbox.getInfo(sandbox.sandboxId, SLOW)).state, 'paused')
      assert.deepEqual((await listed(metadata)).map((entry) => entry.state), ['paused'])
      assert.equal(await sandbox.isRunning(SLOW), false)
      assert.equal(await sandbox.pause(SLOW), false)
    }
    await own(use, TEMPLATE, { metadata })
  },

  pause_disk: () =>
    own(async (sandbox) => {
      const counter = await start(sandbox, 'sleep 3600')
      const lost = counter.wait().then(() => false, () => true)
      // What lies in /tmp need not outlive a boot.
      const kept = `${ISOLATED ? '/home/user' : '/tmp'}/${unique('kept')}`
      await sandbox.files.write(kept, 'on the disk', SLOW)
      assert.equal(await sandbox.pause({ keepMemory: false, ...SLOW }), true)
      const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 600_000, ...SLOW })
      assert.equal(await again.files.read(kept, SLOW), 'on the disk')
      assert.equal(await run(again, 'echo back'), 'back\n')
      assert.ok(!(await pids(again)).includes(counter.pid))
      assert.equal(await lost, true)
    }),

  connect: () =>
    own(async (sandbox) => {
      const where = await folder(sandbox)
      const counter = await start(sandbox, `while sleep 0.2; do date +%s%N > ${where}/beat; done`)
      // Its stream ends with the pause, one way or the other.
      counter.wait().catch(() => {})
      await waitUntil('it beats', () => sandbox.files.exists(`${where}/beat`, SLOW))
      const other = await Sandbox.connect(sandbox.sandboxId, SLOW)
      assert.equal(await other.files.exists(`${where}/beat`, SLOW), true)
      await sandbox.pause(SLOW)
      const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 600_000, ...SLOW })
      assert.equal(await again.isRunning(SLOW), true)
      assert.equal(await run(again, 'echo back'), 'back\n')
      if (!ISOLATED) return
      assert.ok((await pids(again)).includes(counter.pid))
      const before = await again.files.read(`${where}/beat`, SLOW)
      await waitUntil('it beats again', async () => (await again.files.read(`${where}/beat`, SLOW)) !== before)
    }),

  snapshot: () =>
    own(async (sandbox) => {
      const { snapshotId } = await sandbox.createSnapshot(SLOW)
      assert.ok(snapshotId)
      assert.equal(await run(sandbox, 'echo on'), 'on\n')
      const found = await all(sandbox.listSnapshots(SLOW))
      assert.deepEqual(found.map((entry) => entry.snapshotId), [snapshotId])
      assert.equal(await Sandbox.deleteSnapshot(snapshotId, SLOW), true)
      assert.equal(await Sandbox.deleteSnapshot(snapshotId, SLOW), false)
    }),

  from_snapshot: () =>
    own(async (source) => {
      const where = await folder(source)
      await source.files.write(`${where}/before`, 'before', SLOW)
      const { snapshotId } = await source.createSnapshot(SLOW)
      await source.files.write(`${where}/after`, 'after', SLOW)
      await own((copy) => differsFromThenOn(source, copy, where), snapshotId)
      assert.equal(await Sandbox.deleteSnapshot(snapshotId, SLOW), true)
    }),

  async snapshot_disk() {
    // It sends of its options those that it knows, and no other: its own text says which.
    if (!/memory/.test(String(Sandbox.createSnapshot))) absent('the client has no snapshot of the disk alone')
    throw new Error('the client has such a snapshot now, and the matrix no test of it')
  },

  fork: () =>
    own(async (source) => {
      const where = await folder(source)
      await source.files.write(`${where}/before`, 'before', SLOW)
      const forks = await source.fork({ count: 2, timeoutMs: 600_000, ...SLOW })
      try {
        assert.equal(forks.length, 2)
        for (const fork of forks) assert.ok(fork instanceof Sandbox, String(fork))
        assert.equal(new Set([source, ...forks].map((sandbox) => sandbox.sandboxId)).size, 3)
        await source.files.write(`${where}/after`, 'after', SLOW)
        for (const fork of forks) await differsFromThenOn(source, fork, where)
      } finally {
        for (const fork of forks) if (fork instanceof Sandbox) await Sandbox.kill(fork.sandboxId, SLOW)
      }
    }),

  async rollback() {
    require(Sandbox.prototype, 'rollback', 'rollback: no e2b client has')
  },

  async file_urls() {
    if (process.env.E2B_SANDBOX_URL) absent("under E2B_SANDBOX_URL the client's URLs name no sandbox")
    const use = async (sandbox) => {
      const path = `/tmp/${unique('url')}/a b&ü`
      const form = new FormData()
      form.append('file', new Blob(['sent by URL']), 'a')
      const signed = { useSignatureExpiration: 300 }
      const sent = await fetch(await sandbox.uploadUrl(path, signed), { method: 'POST', body: form })
      assert.equal(sent.status, 200)
      assert.equal(await sandbox.files.read(path, SLOW), 'sent by URL')
      const url = await sandbox.downloadUrl(path, signed)
      assert.equal(await (await fetch(url)).text(), 'sent by URL')
      // A signature is of one path, and one time.
      for (const [name, value] of [['path', '/etc/passwd'], ['signature_expiration', '1'], ['signature', 'v1_00']]) {
        const forged = new URL(url)
        forged.searchParams.set(name, value)
        assert.equal((await fetch(forged)).status, 401, String(forged))
      }
    }
    await own(use, TEMPLATE, { secure: true })
  },

  async async() {
    absent('the client is asynchronous in every call: see the other cells')
  },

  async metrics() {
    const { sandboxId } = await shared()
    const points = await waitUntil('there is a measurement', async () => {
      const points = await Sandbox.getMetrics(sandboxId, SLOW)
      return points.length > 0 && points
    })
    const point = points.at(-1)
    assert.equal(point.cpuCount, (await Sandbox.getInfo(sandboxId, SLOW)).cpuCount)
    assert.ok(point.cpuUsedPct >= 0 && point.cpuUsedPct <= 100 * point.cpuCount, JSON.stringify(point))
    assert.ok(point.memUsed > 0 && point.memUsed <= point.memTotal, JSON.stringify(point))
    assert.ok(point.diskUsed > 0 && point.diskUsed <= point.diskTotal, JSON.stringify(point))
    assert.ok(Math.abs(Date.now() - point.timestamp) < 120_000, JSON.stringify(point))
  },

  async kill() {
    const sandbox = await make()
    assert.equal(await sandbox.kill(SLOW), true)
    assert.equal(await sandbox.isRunning(SLOW), false)
    assert.equal(await Sandbox.kill(sandbox.sandboxId, SLOW), false)
    await rejects(NotFoundError, Sandbox.getInfo(sandbox.sandboxId, SLOW))
  },
}

try {
  await main(features)
} finally {
  if (sharedSandbox) await Sandbox.kill(sharedSandbox.sandboxId, SLOW)
}
// Connections that the client keeps would keep the process.
process.exit(0)
