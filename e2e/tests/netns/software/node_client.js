// Node's clients: an agent that keeps its connection, and fetch.
const http = require('node:http');
const [host, port] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
const sockets = new Set();
const once = (i) => new Promise((ok, fail) => {
  const req = http.request({ host, port, agent, method: 'POST', path: `/${i}` }, (res) => {
    sockets.add(res.socket.localPort);
    let body = '';
    res.on('data', (d) => { body += d; });
    res.on('end', () => (body === `hello ${i}POST /${i}\n` ? ok() : fail(new Error(body))));
  });
  req.on('error', fail);
  req.end(`hello ${i}`);
});
(async () => {
  for (let i = 0; i < 100; i++) await once(i);
  if (sockets.size !== 1) throw new Error(`${sockets.size} connections`);
  const all = await Promise.all(Array.from({ length: 50 }, (_, i) =>
    fetch(`http://${host}:${port}/f${i}`).then((r) => r.text())));
  all.forEach((t, i) => { if (t !== `GET /f${i}\n`) throw new Error(t); });
  agent.destroy();
  console.log('100 on one kept connection, 50 by fetch');
})().catch((e) => { console.error(e); process.exit(1); });
