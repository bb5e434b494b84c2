package logic

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/rs/zerolog"
)

// retry calls f until it succeeds or ctx ends, with jittered pauses of up to 2 s. The first failure
// and every tenth one are logged.
func retry(ctx context.Context, logger zerolog.Logger, what string, f func(context.Context) error) error {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval = 50 * time.Millisecond
	pauses.MaxInterval = 2 * time.Second
	attempt := 0
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		return struct{}{}, f(ctx)
	}, backoff.WithBackOff(pauses), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, pause time.Duration) {
			if attempt%10 == 0 && ctx.Err() == nil {
				logger.Warn().Err(err).Dur("again_in", pause).Msg("cannot " + what + ", trying on")
			}
			attempt++
		}))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if attempt > 0 {
		logger.Info().Int("attempts", attempt+1).Msg("could " + what + " again")
	}
	return nil
}
