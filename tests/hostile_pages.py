"""Pages that try to hang, to harm or to get out, for tests/test_pages.py and bench/pages.py."""
from worlds.browser import MOST_CHARACTERS


def hostile_pages(host):
    """{name: source}. host: what no page may reach, as "127.0.0.1:80"."""
    there = f"http://{host}"
    return {
        "loop": "<script>while(true){}</script><p>after</p>",
        "alert": "<script>alert(1);confirm(2);prompt(3)</script><body onload=alert(4)><p>after</p>",
        "redirect": f"<meta http-equiv=refresh content='0;url={there}/meta'><p>after</p>",
        "hard redirect": f"<meta content='>' http-equiv=refresh content='0;url={there}/meta2'><p>after</p>",
        "file redirect": "<meta content='>' http-equiv=refresh content='0;url=file:///etc/passwd'><p>after</p>",
        "script redirect": f"<script>location='{there}/script'</script><p>after</p>",
        "links": f"<link rel=stylesheet href={there}/css><link rel=preload as=image href={there}/pre>"
                 f"<img src={there}/img><link rel=dns-prefetch href={there}><link rel=prefetch href={there}/fetch>"
                 f"<p>after</p>"
                 f"<style>@import '{there}/import';@font-face{{font-family:f;src:url({there}/font)}}"
                 f"p{{font-family:f;background:url({there}/bg)}}</style><iframe src={there}/frame></iframe>"
                 f"<object data={there}/object></object><embed src={there}/embed>"
                 f"<video src={there}/video autoplay></video>",
        "file": "<img src=file:///etc/passwd><iframe src=file:///etc/passwd></iframe><p>after</p>"
                "<link rel=stylesheet href=file:///etc/hosts><object data=file:///etc/passwd></object>",
        "frame in svg": f"<svg><foreignObject width=9 height=9><iframe src={there}/svg></iframe></foreignObject></svg>"
                        f"<svg><image href={there}/image /><use href={there}/use#a /></svg><p>after</p>",
        "base": f"<base href={there}/><img src=base.png><form action=x><button autofocus>b</button></form><p>after</p>",
        "huge": "<div style='height:10000000px;width:9000000px;background:red'>x</div><p>after</p>",
        "deep": "<div>" * 20_000 + "deep",
        "wide": "<p>word</p>" * 18_000,
        "table": "<table>" * 5_000 + "<tr><td>x" * 5_000,
        "filters": "<p>after</p>" + 400 * "<div style='position:fixed;inset:0;backdrop-filter:blur(40px)'></div>",
        "shadows": "<p>after</p>" + 300 * ("<div style='width:5000px;height:5000px;filter:blur(200px);"
                                           "box-shadow:0 0 900px red'></div>"),
        "long": "x" * (MOST_CHARACTERS + 1),
        "odd": "\x00\ud800<p>after</p>\u202e",
        "unclosed": "<p>before</p><textarea><style><!--",
        "no letters": "<plaintext>",
    }
