"""`pdm run docs`：写下生成的页面，再把网站建在 build/site；有坏的链接、缺一句中文就不成。"""

from __future__ import annotations

import sys

from handbook.chinese import UnknownTextError
from handbook.generated import write_generated
from handbook.site import SITE, SiteError, build_site

if __name__ == "__main__":
    try:
        for path in write_generated():
            sys.stderr.write(f"wrote {path}\n")
        build_site(SITE)
    except (UnknownTextError, SiteError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{SITE / 'index.html'}\n")
