"""The address guard: every known disguise of a private address is refused."""

import asyncio
import pathlib
import socket
import ssl

import httpx
import pytest
from fault_server import FaultServer, always, header, path, response

from mmsr_jax.tools import guard as guard_lib
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.guard import Guard, not_public
from mmsr_jax.tools.http import Http, HttpConfig, HttpRequest

PUBLIC, PUBLIC_V6 = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
CERTIFICATE = pathlib.Path(__file__).with_name("pinned_example.pem")  # of pinned.example only

FORMS = {
    "loopback": "http://127.0.0.1/",
    "loopback, other": "http://127.8.9.1/",
    "one number": "http://2130706433/",
    "one number, octal": "http://017700000001/",
    "one number, hex": "http://0x7f000001/",
    "octal parts": "http://0177.0.0.1/",
    "hex parts": "http://0x7f.0x0.0x0.0x1/",
    "two parts": "http://127.1/",
    "three parts": "http://127.0.1/",
    "zeros in front": "http://127.000.000.001/",
    "trailing dot": "http://127.0.0.1./",
    "too large a number": "http://4294967297/",
    "full-width digits": "http://127.0.0.1/",
    "full-width dots": "http://127。0。0。1/",
    "circled digits": "http://①②⑦.⓪.⓪.①/",
    "any address": "http://0.0.0.0/",
    "any address, short": "http://0/",
    "private 10": "http://10.0.0.5/",
    "private 172": "http://172.16.3.4/",
    "private 192": "http://192.168.1.1/",
    "carrier-grade NAT": "http://100.64.0.1/",
    "cloud metadata": "http://169.254.169.254/latest/meta-data/",
    "cloud metadata, Alibaba": "http://100.100.100.200/",
    "cloud metadata, Azure": "http://168.63.129.16/",
    "cloud metadata, Oracle": "http://192.0.0.192/",
    "cloud metadata, IPv6": "http://[fd00:ec2::254]/",
    "cloud metadata by name": "http://metadata.google.internal/",
    "multicast": "http://224.0.0.1/",
    "broadcast": "http://255.255.255.255/",
    "reserved": "http://240.0.0.1/",
    "benchmark network": "http://198.18.0.1/",
    "documentation network": "http://192.0.2.1/",
    "IPv6 loopback": "http://[::1]/",
    "IPv6 loopback, long": "http://[0:0:0:0:0:0:0:1]/",
    "IPv6 any": "http://[::]/",
    "IPv6 mapped": "http://[::ffff:127.0.0.1]/",
    "IPv6 mapped, hex": "http://[::ffff:7f00:1]/",
    "IPv6 mapped public": f"http://[::ffff:{PUBLIC}]/",
    "IPv6 compatible": "http://[::127.0.0.1]/",
    "NAT64": "http://[64:ff9b::7f00:1]/",
    "NAT64, local": "http://[64:ff9b:1::7f00:1]/",
    "6to4": "http://[2002:7f00:1::]/",
    "Teredo": "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
    "link-local": "http://[fe80::1]/",
    "link-local, zone": "http://[fe80::1%25eth0]/",
    "unique local": "http://[fc00::1]/",
    "site-local": "http://[fec0::1]/",
    "IPv6 multicast": "http://[ff02::1]/",
    "localhost": "http://localhost/",
    "localhost, dot": "http://localhost./",
    "localhost, case": "http://LOCALHOST/",
    "under localhost": "http://a.localhost/",
    "name without a dot": "http://intranet/",
    "mDNS": "http://printer.local/",
    "user": "http://user@example.com/",
    "user and password": "http://example.com:80@127.0.0.1/",
    "user, encoded host": "http://example.com%2f@127.0.0.1/",
    "user, hash": "http://127.0.0.1#@example.com/",
    "user, backslash": "http://example.com\\@127.0.0.1/",
    "backslash": "http://127.0.0.1\\.example.com/",
    "backslash in the path": "http://example.com/\\..\\127.0.0.1/",
    "percent in the host": "http://127%2e0.0.1/",
    "new line": "http://exa\nmple.com/",
    "tab": "http://127.0.0.1\t.example.com/",
    "null": "http://example.com\0.127.0.0.1/",
    "space": "http://127.0.0.1 .example.com/",
    "two ports": "http://example.com:80:8080/",
    "port over the top": "http://example.com:65616/",
    "port in other digits": "http://example.com:٨٠/",
    "ssh": "http://example.com:22/",
    "mail": "http://example.com:25/",
    "empty host": "http:///etc/passwd",
    "empty label": "http://example..com/",
    "no slashes": "http:127.0.0.1/",
    "file": "file:///etc/passwd",
    "file with a host": "file://example.com/etc/passwd",
    "gopher": "gopher://127.0.0.1:6379/_INFO",
    "dict": "dict://127.0.0.1:11211/stats",
    "ftp": "ftp://example.com/",
    "jar": "jar:http://example.com/!/",
    "data": "data:text/html,hello",
    "javascript": "javascript:alert(1)",
    "no scheme": "//127.0.0.1/",
    "nothing": "",
    "broken IPv6": "http://[::1/",
    "IPv6 with words": "http://[::1]evil.example/",
    "IPv6 that is none": "http://[1:2]/",
    "label too long": "http://" + "a" * 64 + ".example/",
    "URL too long": "http://example.com/" + "a" * 5000,
}


def resolver(*answers):
    """A name server: one answer (a list of addresses) a question, then the last for ever."""
    asked = []

    async def resolve(host, port):
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    resolve.asked = asked
    return resolve


def mock(handler, *answers, **config):
    """An `Http` without a network: what would go out goes to `handler`."""
    return Http(
        HttpConfig(retries=0, **config),
        transport=httpx.MockTransport(handler),
        resolve=resolver(*answers),
    )


async def fetch(http, url, **fields):
    async with http:
        return await http.send(HttpRequest("web", "GET", url, public_only=True, **fields))


@pytest.mark.parametrize("form", FORMS)
def test_disguises_are_refused(form):
    def handler(request):
        raise AssertionError(f"a request went out to {request.url}")

    # The name server would say that every name is public: the form alone is the reason.
    with pytest.raises(ToolError, match="^refused: "):
        asyncio.run(fetch(mock(handler, [PUBLIC]), FORMS[form]))


@pytest.mark.parametrize(
    "url, canonical",
    [
        ("http://example.com", "http://example.com/"),
        ("HTTPS://Example.COM:443/a b?c=d#e", "https://example.com/a%20b?c=d"),
        ("http://example.com:8080?q", "http://example.com:8080/?q"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        (f"http://{PUBLIC}/", f"http://{PUBLIC}/"),
        (f"https://[{PUBLIC_V6}]/x", f"https://[{PUBLIC_V6}]/x"),
        ("http://example.com./", "http://example.com/"),
        ("http://example.com/@user", "http://example.com/@user"),
    ],
)
def test_pages_of_the_public_web_pass(url, canonical):
    assert asyncio.run(Guard(resolve=resolver([PUBLIC])).check(url)).url == canonical


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.1"],  # one of several is enough
        [PUBLIC_V6, "::1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
        ["169.254.169.254"],
        ["not an address"],
    ],
)
def test_names_that_lead_to_private_addresses_are_refused(addresses):
    guard = Guard(resolve=resolver(addresses))
    with pytest.raises(ToolError, match="^refused: innocent.example leads to"):
        asyncio.run(guard.check("http://innocent.example/"))


def test_names_without_an_address_are_unreachable():
    async def resolve(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    for answer in (resolve, resolver([])):
        with pytest.raises(ToolError, match="^unreachable: nowhere.example has no address"):
            asyncio.run(Guard(resolve=answer).check("http://nowhere.example/"))


def test_a_name_that_turns_private_is_asked_for_only_once():
    seen = []

    def handler(request):
        seen.append((request.url.host, request.headers["host"], request.extensions))
        return httpx.Response(200, content=b"page")

    http = mock(handler, [PUBLIC], ["127.0.0.1"])
    answer = asyncio.run(fetch(http, "https://rebinding.example/x"))
    assert answer.body == b"page" and answer.url == "https://rebinding.example/x"
    ((host, name, extensions),) = seen
    assert host == PUBLIC and name == "rebinding.example"
    assert extensions["sni_hostname"] == "rebinding.example"
    assert http._guard._resolve.asked == ["rebinding.example"]


def test_over_a_real_socket_no_second_lookup_reaches_the_machine(monkeypatch):
    """The system's resolver turns private after the check; no connection may come of it."""
    answers = [PUBLIC, "127.0.0.1", "127.0.0.1"]

    def getaddrinfo(host, port, *args, **kwargs):
        if host in (PUBLIC, b"93.184.215.14"):  # a literal: what the connection asks for
            raise OSError("this test has no way out")
        address = answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def run():
        async with FaultServer(always(body=b"secret")) as server:
            monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
            http = Http(HttpConfig(retries=0, connect_timeout=0.5))
            try:
                with pytest.raises(ToolError, match="^(unreachable|timeout): "):
                    await fetch(http, f"http://rebinding.example:{server.port}/", deadline=2)
            finally:
                monkeypatch.undo()
            assert not server.heads and len(answers) == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    "there",
    [
        "http://127.0.0.1/",
        "//127.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/",
        "http://localhost/",
        "http://private.example/",
        "http://2130706433/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://user@example.com/",
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_private_addresses_are_refused(there, status):
    seen = []

    def handler(request):
        seen.append(request.url.host)
        return httpx.Response(status, headers={"Location": there})

    http = mock(handler, [PUBLIC], ["192.168.0.1"])  # private.example is the second name
    with pytest.raises(ToolError, match="^refused: "):
        asyncio.run(fetch(http, "http://example.com/"))
    assert seen == [PUBLIC]


def test_redirects_between_public_pages_are_followed_and_pinned_again():
    seen = []

    def handler(request):
        seen.append((request.url.host, request.headers["host"], request.headers.get("x-key")))
        if request.url.path == "/a":
            return httpx.Response(301, headers={"Location": "/b"})
        if request.url.path == "/b":
            return httpx.Response(302, headers={"Location": "https://other.example/c"})
        return httpx.Response(200, content=b"page")

    http = mock(handler, [PUBLIC], [PUBLIC], [PUBLIC_V6])
    answer = asyncio.run(fetch(http, "http://example.com/a", headers={"X-Key": "k"}))
    assert answer.url == "https://other.example/c"
    assert seen == [
        (PUBLIC, "example.com", "k"),
        (PUBLIC, "example.com", "k"),
        (PUBLIC_V6, "other.example", None),  # another server: our headers stay here
    ]


def test_redirects_have_an_end():
    http = mock(lambda request: httpx.Response(302, headers={"Location": "/"}), [PUBLIC])
    with pytest.raises(ToolError, match="^bad_response: more than 5 redirects"):
        asyncio.run(fetch(http, "http://example.com/"))


def test_every_address_of_a_name_is_tried():
    def handler(request):
        if ":" in request.url.host:
            raise httpx.ConnectError("no IPv6 here")
        return httpx.Response(200, content=b"page")

    http = mock(handler, [PUBLIC_V6, PUBLIC])
    assert asyncio.run(fetch(http, "http://example.com/")).body == b"page"


def test_the_allow_list_is_for_one_service():
    async def run():
        async with FaultServer(always(body=b"ours")) as server, FaultServer(always()) as other:
            allow = (f"127.0.0.1:{server.port}", f"wiki.local:{server.port}")
            config = HttpConfig(allow=allow, retries=0)
            http = Http(config, resolve=resolver(["127.0.0.1"]))
            async with http:
                for host in ("127.0.0.1", "wiki.local"):
                    url = f"http://{host}:{server.port}/x"
                    request = HttpRequest("web", "GET", url, public_only=True)
                    assert (await http.send(request)).body == b"ours"
                    assert header(server.heads[-1], "host") == f"{host}:{server.port}"
                    assert path(server.heads[-1]) == "/x"
                for url in (other.url, f"http://wiki.local:{other.port}", "http://127.0.0.1:1"):
                    with pytest.raises(ToolError, match="^refused"):
                        await http.send(HttpRequest("web", "GET", url, public_only=True))
            assert not other.heads

    asyncio.run(run())


def test_entries_of_the_allow_list():
    guard = Guard(("Wiki.local:8080", "[fd00::1]:80", "10.0.0.7"))
    for url in ("http://wiki.local:8080/", "http://[FD00::1]/", "https://10.0.0.7/"):
        assert guard.read(url).listed
    for url in (
        "http://10.0.0.7:9999/",
        "http://wiki.local/",
        "http://[fd00::1]:81/",
        "http://10.0.0.77/",
    ):
        with pytest.raises(ToolError, match="^refused"):
            guard.read(url)
    for entry in ("http://wiki.local", "wiki.local/x", "*.local", ""):
        with pytest.raises(ValueError, match="allow: .* is no host or host:port"):
            Guard((entry,))


def test_an_entry_without_a_port_is_for_the_two_of_the_web():
    guard = Guard(("wiki.local",))
    for url in ("http://wiki.local/x", "https://wiki.local/", "http://wiki.local:443/"):
        assert guard.read(url).listed
    for url in ("http://wiki.local:8080/", "http://wiki.local:22/", "http://wiki.local:9200/"):
        with pytest.raises(ToolError, match="^refused"):
            guard.read(url)
    assert Guard(("wiki.local:8080",)).read("http://wiki.local:8080/").listed


def test_a_name_server_that_hangs_leaves_time_for_something_else(monkeypatch):
    async def hang(host, port):
        await asyncio.sleep(60)

    monkeypatch.setattr(guard_lib, "RESOLVE_SECONDS", 0.05)
    with pytest.raises(ToolError, match="^unreachable: no name server knows slow.example in time"):
        asyncio.run(Guard(resolve=hang).check("http://slow.example/"))


def test_redirects_leave_the_allow_list():
    async def run():
        async with FaultServer(always()) as inner:

            async def away(head, reader, writer):
                writer.write(response(302, Location=inner.url + "/admin"))

            async with FaultServer(away) as server:
                http = Http(HttpConfig(allow=(f"127.0.0.1:{server.port}",), retries=0))
                with pytest.raises(ToolError, match="^refused: 127.0.0.1, which is not public"):
                    await fetch(http, server.url)
            assert not inner.heads

    asyncio.run(run())


def test_pinned_connections_still_check_the_name_in_the_certificate():
    """TLS over a loopback socket: the certificate is good for pinned.example, not for others."""
    names = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    context.sni_callback = lambda sock, name, context: names.append(name)

    async def run():
        async with FaultServer(always(body=b"tls"), context) as server:
            allow = (f"pinned.example:{server.port}", f"other.example:{server.port}")
            config = HttpConfig(allow=allow, ca_file=str(CERTIFICATE), retries=0)
            http = Http(config, resolve=resolver(["127.0.0.1"]))
            async with http:
                url = f"https://pinned.example:{server.port}/"
                good = await http.send(HttpRequest("web", "GET", url, public_only=True))
                assert good.body == b"tls"
                assert header(server.heads[0], "host") == f"pinned.example:{server.port}"
                url = f"https://other.example:{server.port}/"
                with pytest.raises(ToolError, match="^unreachable: .*CERTIFICATE_VERIFY_FAILED"):
                    await http.send(HttpRequest("web", "GET", url, public_only=True))
            assert names == ["pinned.example", "other.example"] and len(server.heads) == 1

    asyncio.run(run())


def test_a_missing_ca_file_is_named():
    with pytest.raises(ValueError, match="nowhere.pem cannot be read"):
        Http(HttpConfig(ca_file="nowhere.pem"))


def test_addresses():
    assert not not_public(PUBLIC) and not not_public(PUBLIC_V6) and not not_public("8.8.8.8")
    for address in ("::ffff:8.8.8.8", "2002:808:808::", "100.127.255.255", "3fff::1", "x"):
        assert not_public(address)
