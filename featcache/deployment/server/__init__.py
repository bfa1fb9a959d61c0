"""Server: a run -> a page and a JSON endpoint that classify images.

In: a run folder, and the images of requests. Out: answers; nothing of a request is kept. Begin with
``serving.serve``; a request passes ``guard``, then ``routes``, ``uploads`` and ``work_queue``;
``page/`` is the page.
"""
