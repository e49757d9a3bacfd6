"""Which addresses a URL that a stranger wrote may lead to: public ones, and an allow-list.

The check is of the address, not of the name: a name is resolved once, every address that it has
must be public, and the client then connects to the address that was checked (so a name that
turns private a moment later changes nothing). What cannot be read in exactly one way is refused.
"""

import asyncio
import concurrent.futures
import dataclasses
import functools
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable

import idna

from mmsr_jax.tools.base import ToolError

Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_URL_CHARS = 4096
MAX_ADDRESSES = 32  # a name with more is no web site
RESOLVE_SECONDS = 10.0  # then another try may go to another name server
RESOLVERS = 32  # threads; they cannot be cancelled, so a name server that hangs keeps them a while
PORTS = {"http": 80, "https": 443}
FIRST_FREE_PORT = 1024  # below it only 80 and 443: no mail, no shells, no file servers

# Names that mean this machine, its network or its cloud's metadata service.
LOCAL_NAMES = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home.arpa")

# What the `ipaddress` of some Python versions calls global although no web site lives there.
REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; a cloud's metadata service lives there too
        "168.63.129.16/32",  # Azure's wire server
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
        "240.0.0.0/4",
        "2001::/23",  # Teredo and other protocol assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
# All that is given to sites so far; so ::ffff:0:0/96 (mapped), 64:ff9b::/96 (NAT64), fc00::/7
# (unique local), fe80::/10, ff00::/8 and the rest are outside.
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")

_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})+")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_PORT = re.compile(r"\d{1,5}")


@dataclasses.dataclass(frozen=True)
class Target:
    """A URL that was read, and where it leads."""

    url: str  # canonical: ASCII host, no user, no fragment
    scheme: str
    host: str  # lower case, no brackets; for the Host header and for TLS
    port: int
    listed: bool  # stands in the allow-list, so any address will do
    addresses: tuple[str, ...] = ()  # checked; empty before `Guard.check`


class Guard:
    """Checks URLs.

    Args:
        allow: "host:port" of services that may be reached at any address; "host" is its ports 80
            and 443. Redirects of strangers' pages may lead there too.
        resolve: (host, port) -> addresses; the system's resolver if not given.

    Raises:
        ValueError: an entry of `allow` that no host could match.
    """

    def __init__(self, allow: Iterable[str] = (), resolve: Resolve | None = None):
        self._allow = frozenset(re.sub(r"[\[\]]", "", entry.lower()) for entry in allow)
        for entry in self._allow:
            if not re.fullmatch(r"[a-z0-9_.:-]+", entry):
                raise ValueError(f"allow: {entry!r} is no host or host:port, e.g. wiki.local:8080")
        self._resolve = resolve or system_resolve

    def read(self, url: str) -> Target:
        """Takes a URL apart; checks all that can be checked without asking for addresses.

        Raises:
            ToolError: "refused", with the reason.
        """
        if len(url) > MAX_URL_CHARS:
            raise _refused(f"a URL of {len(url)} characters, at most {MAX_URL_CHARS}")
        url = url.strip()
        if any(ord(char) < 0x20 or ord(char) == 0x7F for char in url):
            raise _refused("control characters in the URL")
        scheme, colon, rest = url.partition("://")
        scheme = scheme.lower()
        if not colon or scheme not in PORTS:
            raise _refused(f"only http and https, not {url.partition(':')[0][:20]!r}")
        end = re.search(r"[/?#\\]", rest)
        netloc, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
        if "\\" in netloc + tail.partition("?")[0]:
            raise _refused("a backslash in the URL")  # browsers read it as a slash, others do not
        if "@" in netloc:
            raise _refused("a user name in the URL")
        host, port = self._host_and_port(netloc, scheme)
        listed = f"{host}:{port}" in self._allow
        listed |= host in self._allow and port in PORTS.values()
        if not listed:
            _check_name(host, port)
        tail = tail.partition("#")[0].replace(" ", "%20")
        shown = f"[{host}]" if ":" in host else host
        if port != PORTS[scheme]:
            shown += f":{port}"
        path = tail if tail.startswith("/") else "/" + tail
        return Target(f"{scheme}://{shown}{path}", scheme, host, port, listed)

    async def check(self, url: str) -> Target:
        """Resolves a URL's host and checks every address.

        Raises:
            ToolError: "refused"; "unreachable" when the name has no address.
        """
        target = self.read(url)
        literal = _literal(target.host)
        found = [str(literal)] if literal else await self._addresses(target)
        if not target.listed:
            for address in found:
                if why := not_public(address):
                    raise _refused(f"{target.host} leads to {address}, {why}")
        return dataclasses.replace(target, addresses=tuple(found))

    async def _addresses(self, target: Target) -> list[str]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self._resolve(target.host, target.port)
        except TimeoutError:
            raise ToolError("unreachable", f"no name server knows {target.host} in time") from None
        except UnicodeError:
            raise _refused(f"{target.host} is no host name") from None
        except OSError:
            found = []
        if not found:
            raise ToolError("unreachable", f"{target.host} has no address")
        return list(dict.fromkeys(found))[:MAX_ADDRESSES]

    @staticmethod
    def _host_and_port(netloc: str, scheme: str) -> tuple[str, int]:
        bracketed = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::(.*))?", netloc)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
            try:
                host = str(ipaddress.IPv6Address(host))
            except ValueError:
                raise _refused("a broken IPv6 address") from None
        else:
            host, colon, port = netloc.partition(":")
            host, port = _ascii(host), port if colon else None
        if port in (None, ""):
            return host, PORTS[scheme]
        if not _PORT.fullmatch(port) or not port.isascii() or not 0 < int(port) < 65_536:
            raise _refused(f"port {port[:10]!r}")
        return host, int(port)


def not_public(address: str) -> str:
    """Why an address is none of the public web's; empty if it is one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone ("fe80::1%eth0"), or no address at all
        return "which is no plain address"
    if ip.version == 6 and (getattr(ip, "scope_id", None) or ip not in PUBLIC_IPV6):
        return "which is not public"
    if ip.is_multicast or ip.is_reserved or not ip.is_global:
        return "which is not public"
    if any(ip in network for network in REFUSED_NETWORKS if network.version == ip.version):
        return "which is not public"
    return ""


async def system_resolve(host: str, port: int) -> list[str]:
    """Addresses of a host, in the order in which the system would try them."""
    ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_resolvers(), ask)
    return [entry[4][0] for entry in found]


@functools.cache
def _resolvers() -> concurrent.futures.Executor:
    # Its own threads: a name server that hangs must not use up those of other work.
    return concurrent.futures.ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolve")


def _refused(why: str) -> ToolError:
    return ToolError("refused", why)


def _ascii(host: str) -> str:
    """A host as DNS spells it, in lower case and without the last dot."""
    if not host.isascii():
        try:  # full-width digits and dots turn into plain ones here, before anything is checked
            host = idna.encode(host, uts46=True).decode("ascii")
        except UnicodeError:  # of which IDNAError is one
            raise _refused("a host name that DNS cannot spell") from None
    return host.lower().removesuffix(".")


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _check_name(host: str, port: int) -> None:
    """Refuses what is not plainly an address or a full name on the public web."""
    if port < FIRST_FREE_PORT and port not in PORTS.values():
        raise _refused(f"port {port}")
    literal = _literal(host)
    if literal is not None:
        if why := not_public(host):
            raise _refused(f"{host}, {why}")
        return
    # "2130706433", "0x7f.1", "0177.0.0.1", "127.1": addresses to some resolvers.
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise _refused(f"{host[:60]!r} spells an address in an unusual way")
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise _refused(f"{host[:60]!r} is no full host name")
    if any(host == name or host.endswith("." + name) for name in LOCAL_NAMES):
        raise _refused(f"{host} is a local name")
