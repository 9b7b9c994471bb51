// Runs one check of the stock JavaScript client: check.mjs KUBECONFIG POD CHECK. It ends with 0 if all is well.
import assert from 'node:assert';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtempSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough, Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import tar from 'tar-fs';
import WebSocket from 'ws';
import { Attach, Cp, Exec, KubeConfig, PortForward } from '@kubernetes/client-node';

const [kubeconfig, pod, check] = process.argv.slice(2);
const config = new KubeConfig();
config.loadFromFile(kubeconfig);

// offering makes the client speak one protocol, as its older versions do.
const offering = (protocol) => {
    const { handler } = new Exec(config);
    handler.socketFactory = (uri, _, options) => new WebSocket(uri, [protocol], options);
    return handler;
};

const sum = (data) => createHash('sha256').update(data).digest('hex');

const collect = () => {
    const stream = new PassThrough();
    stream.text = '';
    stream.on('data', (data) => { stream.text += data; });
    return stream;
};

// run waits for a command's end.
const run = async (command, { stdin = null, handler, tty = false } = {}) => {
    const stdout = collect(), stderr = collect();
    const status = await new Promise((resolve, reject) => {
        new Exec(config, handler).exec('default', pod, 'main', command, stdout, stderr, stdin, tty, resolve)
            .then((socket) => socket.on('close', () => setTimeout(() => reject(new Error('closed without a status')), 1000)), reject);
    });
    await sleep(10);
    return { stdout: stdout.text, stderr: stderr.text, status };
};
const shell = async (script) => (await run(['sh', '-c', script])).stdout;

const until = async (what, condition) => {
    for (const end = Date.now() + 60000; !(await condition());) {
        assert(Date.now() < end, what);
        await sleep(100);
    }
};

const checks = {
    async exec() {
        for (const handler of [undefined, offering('v4.channel.k8s.io')]) {
            const { stdout, stderr, status } = await run(['sh', '-c', 'echo out; echo err >&2; exit 7'], { handler });
            assert.deepEqual([stdout, stderr, status.status, status.details.causes[0].message], ['out\n', 'err\n', 'Failure', '7']);
        }
    },
    async exec_input() {
        const { stdout, status } = await run(['wc', '-c'], { stdin: Readable.from([Buffer.alloc(100000), Buffer.alloc(23456)]) });
        assert.deepEqual([stdout.trim(), status.status], ['123456', 'Success']);
    },
    // With v4 this client ends its input by closing.
    async exec_upload_v4() {
        for (const size of [1, 32000, 3200000]) {
            const data = randomBytes(size);
            const name = `/tmp/js-${size}`;
            await new Exec(config, offering('v4.channel.k8s.io')).exec('default', pod, 'main',
                ['sh', '-c', `sleep 1; cat > ${name}; sha256sum < ${name} > ${name}.sum`], collect(), collect(), Readable.from([data]), false);
            await until('the upload is whole', async () => (await shell(`cat ${name}.sum 2>/dev/null || true`)).startsWith(sum(data)));
        }
    },
    async copy() {
        for (const handler of [undefined, offering('v4.channel.k8s.io')]) {
            const local = mkdtempSync(join(tmpdir(), 'streamshim-js-'));
            const data = randomBytes(2000000);
            mkdirSync(join(local, 'in'));
            writeFileSync(join(local, 'in', 'file'), data);
            await shell('rm -rf /tmp/js-in; mkdir -p /tmp/js-in');
            const cp = new Cp(config, new Exec(config, handler));
            await cp.cpToPod('default', pod, 'main', join(local, 'in'), '/tmp/js-in');
            await until('the file is in the pod', async () => (await shell('cat /tmp/js-in/file 2>/dev/null | sha256sum')).startsWith(sum(data)));
            // Not cpFromPod, which in this version compresses in the pod and does not decompress here.
            await new Exec(config, handler).exec('default', pod, 'main', ['tar', 'cf', '-', '-C', '/tmp', 'js-in'],
                tar.extract(join(local, 'out')), collect(), null, false);
            await until('the file is back', () => {
                try {
                    return sum(readFileSync(join(local, 'out', 'js-in', 'file'))) === sum(data);
                } catch {
                    return false;
                }
            });
        }
    },
    async attach() {
        const stdout = collect();
        const stdin = new PassThrough();
        const socket = await new Attach(config).attach('default', pod, 'main', stdout, collect(), stdin, false);
        stdin.write('from javascript\n');
        await until('the answer', () => stdout.text.includes('you said: from javascript'));
        socket.close();
    },
    async forward() {
        const output = collect(), errors = collect();
        const input = new PassThrough();
        await new PortForward(config, false).portForward('default', pod, [8080], output, errors, input);
        input.write('GET /page HTTP/1.0\r\n\r\n');
        await until('the page', () => output.text.includes('200 OK') && output.text.endsWith('first\n'));
        assert.equal(errors.text, '');
    },
    async forward_refused() {
        const output = collect(), errors = collect();
        await new PortForward(config, false).portForward('default', pod, [9], output, errors, new PassThrough());
        await until('the message', () => errors.text.includes('nobody listens on port 9'));
        assert.equal(output.text, '');
    },
    async forward_upload() {
        for (const size of [1, 32000, 3200000]) {
            const data = randomBytes(size);
            await shell('rm -f /tmp/port.sum');
            await new PortForward(config, false).portForward('default', pod, [9000], collect(), collect(), Readable.from([data]));
            await until('the upload is whole', async () => (await shell('cat /tmp/port.sum 2>/dev/null || true')).startsWith(sum(data)));
        }
    },
};

await checks[check]();
process.exit(0);
