"""Runs one check of the stock Python client: check.py KUBECONFIG POD CHECK. It ends with 0 if all is well."""
import base64
import hashlib
import http.client
import io
import os
import socket
import sys
import tarfile
import time
import urllib.request

from kubernetes import client, config
from kubernetes.stream import portforward, stream

KUBECONFIG, POD, CHECK = sys.argv[1:]
config.load_kube_config(KUBECONFIG)
core = client.CoreV1Api()


def run(*command, **options):
    """Starts a command and returns its connection, or with _preload_content its output."""
    settings = dict(stderr=True, stdin=False, stdout=True, tty=False)
    settings.update(options)
    return stream(core.connect_get_namespaced_pod_exec, POD, 'default', command=list(command), **settings)


def shell(script):
    return run('sh', '-c', script)


def forward(*ports):
    return portforward(core.connect_get_namespaced_pod_portforward, POD, 'default', ports=','.join(map(str, ports)))


def until(what, condition, limit=60):
    deadline = time.time() + limit
    while not condition():
        assert time.time() < deadline, what
        time.sleep(0.1)


def equal(got, want):
    assert got == want, '%r, not %r' % (got, want)


def exec_output():
    equal(run('sh', '-c', 'echo out; exit 7'), 'out\n')


def exec_exit_code():
    connection = run('sh', '-c', 'echo out; echo err >&2; exit 7', _preload_content=False)
    connection.run_forever(timeout=60)
    equal((connection.read_stdout(), connection.read_stderr(), connection.returncode), ('out\n', 'err\n', 7))


def exec_interactive():
    connection = run('sh', stdin=True, _preload_content=False)
    for i in range(3):
        connection.write_stdin('echo answer %d\n' % i)
        equal(connection.readline_stdout(timeout=30), 'answer %d' % i)
    connection.write_stdin('exit 3\n')
    connection.run_forever(timeout=60)
    equal(connection.returncode, 3)


def exec_terminal():
    connection = run('sh', stdin=True, tty=True, _preload_content=False)
    connection.write_stdin('echo $((40 + 2)); exit\n')
    connection.run_forever(timeout=60)
    assert '42' in connection.read_stdout()


def upload(size, late):
    """What everybody does who copies into a pod: write_stdin of it all, and close."""
    data = os.urandom(size // 2).hex().encode()  # the client takes bytes too, but decodes what comes back
    name = '/tmp/up-%d-%s' % (size, late)
    connection = run('sh', '-c', 'sleep %s; cat > %s; sha256sum < %s > %s.sum' % (late, name, name, name),
                     stdin=True, _preload_content=False)
    for i in range(0, len(data), 100000):
        connection.write_stdin(data[i:i + 100000])
    connection.close()
    want = hashlib.sha256(data).hexdigest()
    until('the upload is whole', lambda: shell('cat %s.sum 2>/dev/null || true' % name).startswith(want))


def exec_upload():
    for _ in range(3):
        for size in (2, 32000, 3200000):
            for late in (0, 1):
                upload(size, late)


def copy_in():
    content = os.urandom(2000000)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w') as tar:
        for name in ('one', 'two'):
            info = tarfile.TarInfo('copied/' + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    connection = run('tar', 'xf', '-', '-C', '/tmp', stdin=True, _preload_content=False)
    connection.write_stdin(archive.getvalue())
    connection.close()
    want = hashlib.sha256(content).hexdigest()
    until('both files are whole', lambda: shell('cat /tmp/copied/two 2>/dev/null | sha256sum').startswith(want))
    assert shell('sha256sum < /tmp/copied/one').startswith(want)


def copy_out():
    shell('rm -rf /tmp/out; mkdir /tmp/out; seq 200000 > /tmp/out/file')
    # In base64, because this client decodes all output as UTF-8.
    text = run('sh', '-c', 'tar cf - -C /tmp out | base64')
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text))) as tar:
        equal(tar.extractfile('out/file').read(), ''.join('%d\n' % i for i in range(1, 200001)).encode())


def attach():
    connection = stream(core.connect_get_namespaced_pod_attach, POD, 'default', stderr=True, stdin=True, stdout=True,
                        tty=False, _preload_content=False)
    connection.write_stdin('a line\n')
    until('the answer', lambda: 'you said: a line' in connection.read_stdout(timeout=1))
    # What is sent right before the close must not be lost either.
    connection.write_stdin('touch /tmp/attached\n' * 2000 + 'done\n')
    connection.close()
    until('the last line', lambda: shell('cat /tmp/said') == 'done\n')


def forward_http():
    ports = forward(8080)
    connection = http.client.HTTPConnection('127.0.0.1')
    connection.sock = ports.socket(8080)
    connection.sock.settimeout(30)
    connection.request('GET', '/page')
    equal(connection.getresponse().read(), b'first\n')


def forward_patched():
    """The client's own example: socket.create_connection leads into the pod."""
    original = socket.create_connection

    def create_connection(address, *args, **kwargs):
        if address[0] == POD + '.pod':
            return forward(address[1]).socket(address[1])
        return original(address, *args, **kwargs)

    socket.create_connection = create_connection
    for _ in range(3):
        with urllib.request.urlopen('http://%s.pod:8081/page' % POD, timeout=30) as answer:
            equal(answer.read(), b'second\n')


def receive(ports, s):
    """What a socket gets. The client waits with select, and over TLS sees no frame that came in one record with others
    until something else comes: the answer to a ping."""
    s.settimeout(2)
    for _ in range(30):
        try:
            return s.recv(1000)
        except socket.timeout:
            ports.websocket.ping()
    raise AssertionError('nothing came')


def forward_refused():
    ports = forward(9)
    s = ports.socket(9)
    equal(receive(ports, s), b'')
    assert 'nobody listens on port 9' in ports.error(9), ports.error(9)


def forward_refused_beside_another():
    ports = forward(9, 8080)
    refused, good = ports.socket(9), ports.socket(8080)
    equal(receive(ports, refused), b'')
    assert 'nobody listens on port 9' in ports.error(9), ports.error(9)
    good.sendall(b'GET /page HTTP/1.1\r\nHost: pod\r\n\r\n')
    assert b'200 OK' in receive(ports, good)
    equal(ports.error(8080), None)


def forward_upload():
    """All of it, and the end of it, arrives at a server that is slow to take it."""
    for size in (1, 32000, 3200000):
        data = os.urandom(size)
        shell('rm -f /tmp/port.sum')
        s = forward(9000).socket(9000)
        s.sendall(data)
        s.close()
        want = hashlib.sha256(data).hexdigest()
        until('the upload is whole', lambda: shell('cat /tmp/port.sum 2>/dev/null || true').startswith(want))


{f.__name__: f for f in (
    exec_output, exec_exit_code, exec_interactive, exec_terminal, exec_upload, copy_in, copy_out, attach,
    forward_http, forward_patched, forward_refused, forward_refused_beside_another, forward_upload,
)}[CHECK]()
