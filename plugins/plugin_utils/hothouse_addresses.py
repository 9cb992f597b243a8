"""IP addresses as an inventory gives them, of either family: read in one place, written in one form."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Addresses of no host, such as ::192.0.2.1, an IPv4 address in a form that nothing speaks any more.
_RESERVED = ipaddress.IPv6Network("::/8")


class NoAddressError(ValueError):
    """Why a text is no address, to go on from "it"."""


def _plain(text: str) -> str:
    """The text, unless something around it keeps it from being an address. Raises NoAddressError."""
    if "%" in text:
        raise NoAddressError("has a zone (what follows the %), which means something on one host alone")
    if text.startswith("[") or text.endswith("]"):
        raise NoAddressError(
            "is in brackets; write the address alone, brackets are added where a port follows"
        )
    return text


def _unmapped(address: Address) -> Address:
    """The address, unless it is an IPv4 address in the form of IPv6. Raises NoAddressError."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        raise NoAddressError(f"is an IPv4 address in the form of IPv6; write {address.ipv4_mapped}")
    return address


def address_of(text: str) -> Address:
    """The address that a text is. Raises NoAddressError."""
    try:
        address = ipaddress.ip_address(_plain(text))
    except NoAddressError:
        raise
    except ValueError:
        raise NoAddressError("is no IP address") from None
    return _unmapped(address)


def network_of(text: str) -> Network:
    """The network that a text is; an address is one of its own. Bits behind the prefix count nothing.

    Raises NoAddressError.
    """
    try:
        network = ipaddress.ip_network(_plain(text), strict=False)
    except NoAddressError:
        raise
    except ValueError:
        raise NoAddressError("is no IP address and no network") from None
    _unmapped(network.network_address)
    return network


def canonical(text: str) -> str:
    """An address as the kernel, Redis and Sentinel print it: shortest, in lower case. What is no address is left."""
    try:
        return str(address_of(text))
    except NoAddressError:
        return text


def bracketed(text: str) -> str:
    """A host as it stands before a port and in a URL: an IPv6 address in brackets, anything else as it is."""
    try:
        address = address_of(text)
    except NoAddressError:
        return text
    return f"[{address}]" if address.version == 6 else str(address)


def unreachable(address: Address) -> str:
    """Why other hosts cannot reach a host under this address, to go on from "which"; nothing if they may."""
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        return "under which no other host reaches it"
    if address.version == 6 and address.is_link_local:
        return "which is good on one link only, and with a zone that each host calls differently"
    if address in _RESERVED:
        return "which is no address of a host"
    return ""


def mail_domain(text: str) -> str:
    """A host as it stands behind the @ of a mail address, where addresses are in brackets (RFC 5321, 4.1.3)."""
    try:
        address = address_of(text)
    except NoAddressError:
        return text
    return f"[IPv6:{address}]" if address.version == 6 else f"[{address}]"
