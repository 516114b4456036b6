"""The dashboard at `/moe`: pages for people, on every host, in the server's own process.

    pages       HTML pages by Jinja2; they hold no data
    assets      scripts, styles and Plotly.js, with their checksums
    routes      the routes, with a strict content-security policy
    report      one HTML file about a job, for people who were not there
    svg         line charts and heat maps as SVG

The shell is public, like a log-in page. All data come from the HTTP API by `fetch`, with the caller's token, so owners
and access policies hold for the pages as for every other client.
"""
