// Node's HTTP server: echoes a body and its trailers, in chunks.
const http = require('node:http');
http.createServer((req, res) => {
  const pieces = [];
  req.on('data', (d) => pieces.push(d));
  req.on('end', () => {
    res.writeHead(200, { 'content-type': 'text/plain', trailer: 'x-checked' });
    for (const p of pieces) res.write(p);
    res.addTrailers({ 'x-checked': req.trailers['x-sum'] || 'none' });
    res.end(`${req.method} ${req.url}\n`);
  });
}).listen(Number(process.argv[2]), '0.0.0.0');
