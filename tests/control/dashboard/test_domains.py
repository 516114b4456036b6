"""The charts of a job with domains, in a browser."""

import re

from playwright.sync_api import expect

from tests.support.browser import Visitor


def test_a_job_with_domains_has_charts_of_each(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-domains")
    for title in ("Loss by domain", "Perplexity by domain"):
        plot = page.locator(f'.plot[aria-label^="{title}, lines over steps."]')
        for domain in ("code", "chat"):
            expect(plot).to_have_attribute("aria-label", re.compile(rf"\b{domain}(, held out)?: last "))
        expect(plot.locator(".scatterlayer .trace").first).to_be_attached()
    visitor.must_be_accessible()
    visitor.picture("domains")
