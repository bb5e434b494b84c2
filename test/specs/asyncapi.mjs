// Validates an AsyncAPI document, and what it refers to, with the parser of the AsyncAPI project.
import { Parser, fromFile } from '@asyncapi/parser'

const parser = new Parser({
  // The document is of 3.0, which more tools know than its successor.
  ruleset: { rules: { 'asyncapi-latest-version': 'off' } },
})
const { document, diagnostics } = await fromFile(parser, process.argv[2]).parse()
for (const d of diagnostics) {
  console.error(`${d.source ?? process.argv[2]}:${d.range.start.line + 1} ${d.code} at ${d.path.join('.')}: ${d.message}`)
}
if (!document || diagnostics.length > 0) process.exit(1)
console.log(`${process.argv[2]}: ${document.allMessages().length} messages in ${document.allChannels().length} channels are valid`)
