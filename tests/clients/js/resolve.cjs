// Names below `localhost` are this machine, as RFC 6761 says. Loaded by node before the client.
const dns = require('node:dns')

const system = dns.lookup
dns.lookup = (host, options, callback) => {
  const name = String(host).endsWith('.localhost') ? '127.0.0.1' : host
  return system(name, options, callback)
}
