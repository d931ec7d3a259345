"""Answers as language models write them, made up for the tests of how they are drawn."""

from __future__ import annotations

PYTHON = '''# Sorting in Python

You can sort a list with **`sorted()`** or *in place* with `list.sort()`. See
[the docs](https://docs.python.org/3/howto/sorting.html) for ***more*** and ~~less~~, snake_case and `2 * 3`.

## Steps

1. First, *read* the file, which is a long sentence that has to be wrapped at the width of the window:
   ```python
   def read(path: str) -> list[int]:
       """Read numbers.

       One per line."""
       return [int(x) for x in open(path)]  # 42
   ```
2. Then sort.
   - nested **bold item** with a long text that goes on and on, so that it is wrapped somewhere
     - deeper
   - another

10. Done.

> A quote that is *long enough* to be wrapped at the end of the line, I hope it is.
>
> - in a quote
'''

COMPARISON = """Here's a comparison of the **three options**:

| Name | Value | Description |
|:-----|------:|:-----------:|
| foo  | 1     | a **bold** cell with `code` |
| bar | 22 | another one, with a rather long text that cannot fit in eighty columns at all |
| `a \\| b` | | |

**In short:** take *foo*.

---

### Why?
- **Speed:** it is 2 * 3 * 4 times as fast, and 5*3 too.
- **Size:** `*args` and **kwargs.
- It has no \\*stars\\*.

Hope this helps! 😊 Let me know if you have questions about `foo_bar_baz` or snake_case_names.
"""

FORMULAS = r"""The **quadratic formula** solves \(ax^2 + bx + c = 0\):

\[
x_{1,2} = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}
\]

where $a \neq 0$, $\mathbf{x}_i + \mathbf{y}_j$ and $$e^{i\pi} + 1 = 0$$ hold. It costs $5, not $10.

$$ \sum_{n=1}^\infty \frac{1}{n^2} = \frac{\pi^2}{6} $$

Set $PATH to **this**, the interval [0, 1) is half open, and a[0:
is nothing.
"""

CODE = """Sure! Here is a small server:

```javascript
/* A server
   in few lines */
const http = require("http");
http.createServer((q, r) => {
  r.end(`hello ${q.url}`); // a very long comment that does not fit into the window of the terminal, and is folded by it
}).listen(8080);
```

Run it with `node server.js`:

~~~
$ node server.js
~~~

Then, in a shell,

    curl localhost:8080

    curl localhost:8080/x

```
no language
  at all
```
```c
int main(void) { return 0; }
"""

POEM = """\
Roses are red,
Violets are blue,
_Models_ write lines,
and **terminals
wrap** them too.

*   First
*   Second

    with a paragraph

*   Third
1) one
2) two
    > quoted
    lazily
- a
-
  b

* * *

Done\\
here\x20\x20
now &amp; then <br> <http://example.org/a_b> [x](javascript:alert(1)) ![A picture](pic.png)
Title
=====
text
---
"""

EAST = """## 概要

日本語の文章は空白がありませんので、幅に合わせて折り返す必要があります。**強調**も`コード`も使います。これは長い文章です。

- 一つ目の項目は、かなり長いので、折り返されるはずです。
- 한국어 문장은 띄어쓰기가 있습니다. **굵게** 그리고 *기울임*.

中文**加粗**文字，然后是English words混合在一起，看看如何换行。「引用」也可以。
"""

ANSWERS = [PYTHON, COMPARISON, FORMULAS, CODE, POEM, EAST]
