"""The page at /: files as they lie here, without a build step, and headers that let them load nothing else.

    index.html, style.css        what there is, and how it looks
    script.js                    the model, the views, looks and keys
    chat.js, completion.js       turns; one document
    answer.js, api.js            one answer under way, measured; what is asked of the server, and its events
    tokens.js, settings.js       a text's tokens and their alternatives; sampling, and what a browser remembers
    elements.js                  text goes in as text

The page is one more client of the public routes; what it says of the model comes from /v1/models and /tokenizer_info.
"""

from importlib.resources import files

from starlette.responses import Response

SCRIPT_NAMES = ("script", "chat", "completion", "answer", "api", "tokens", "settings", "elements")
FILES = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    **{f"/page/{name}.js": (f"{name}.js", "text/javascript") for name in SCRIPT_NAMES},
}
"""Route to file and kind. These need no key, as whoever has one has to be asked for it."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def respond(route: str) -> Response:
    """Return one of FILES, with its headers."""
    name, kind = FILES[route]
    content = (files(__name__) / name).read_bytes()
    return Response(content, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)
