"""What the schemas cannot say of valid messages: the gateway counts the bytes of names where they count characters."""

import schemathesis


def fits(value, limit):
    return not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) <= limit


@schemathesis.hook
def filter_body(context, body):
    if not isinstance(body, dict) or context.operation.path != "/api/messages":
        return True
    data = body.get("data")
    names = [body.get("message_id")]
    if isinstance(data, dict):
        names += [data.get("client_msg_id"), data.get("tempMessageId")]
    return fits(body.get("type"), 64) and all(fits(name, 128) for name in names)


@schemathesis.hook
def filter_query(context, query):
    return not isinstance(query, dict) or fits(query.get("device_id"), 128)
