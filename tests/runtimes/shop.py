"""A Django application: one page leaves a stream of the SDK early, and one uses the database."""

from __future__ import annotations

import os
from collections.abc import Iterator

import django
import openai
import set_up
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection, models
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["SHOP_DATABASE"]}},
    ROOT_URLCONF=__name__,
    SECRET_KEY="of-this-test",
)
django.setup()


class Order(models.Model):
    text = models.TextField()

    class Meta:  # noqa: D106  # Django's
        app_label = "shop"


if os.environ["SHOP_TELEMETRY"] == "by-hand":
    set_up.by_hand()
with connection.schema_editor() as editor:
    editor.create_model(Order)
client = openai.OpenAI(max_retries=0)


def story(request: HttpRequest) -> StreamingHttpResponse:
    """Stream the first words of a story."""
    return StreamingHttpResponse(first_words(request.GET["model"]))


def first_words(model: str) -> Iterator[str]:
    with client.responses.create(model=model, input="x", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                yield event.delta
                break


def orders(_: HttpRequest) -> HttpResponse:
    """Write a row and count the rows."""
    Order.objects.create(text="tea")
    return HttpResponse(str(Order.objects.count()))


urlpatterns = [path("story", story), path("orders", orders)]
application = get_wsgi_application()
