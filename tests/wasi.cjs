// node tests/wasi.cjs PROGRAM.wasm ARGS... - runs a WASI program with the working directory open.
const { WASI } = require('wasi');
const { readFileSync } = require('fs');
const [file, ...args] = process.argv.slice(2);
const wasi = new WASI({ version: 'preview1', args: [file, ...args], preopens: { '.': '.' } });
const imports = { wasi_snapshot_preview1: wasi.wasiImport };
WebAssembly.instantiate(readFileSync(file), imports).then(
    ({ instance }) => process.exit(wasi.start(instance) || 0),
    (e) => { console.error(String(e)); process.exit(1); });
