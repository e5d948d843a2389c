"""Write ``docs/compatibility.md`` anew: ``python -m tests.compatibility``."""

from tests.compatibility.page import PAGE, render

PAGE.write_text(render(), encoding="utf-8")
print(f"wrote {PAGE}")
